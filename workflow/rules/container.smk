# The image of --use-singularity, once, in the store: pulled by digest or found as a file, and hashed.


localrules:
    stage_image,


rule stage_image:
    input:
        [] if IMAGE.pulled else str(IMAGE.sif),
    output:
        **({"sif": str(IMAGE.record.with_suffix(".sif"))} if IMAGE.pulled else {}),
        record=str(IMAGE.record),
    log:
        f"logs/stage/image-{IMAGE.record.stem}.log",
    container:
        None
    params:
        known=shlex.join(
            [
                *(["--digest", IMAGE.digest] if IMAGE.digest else []),
                *(["--sif-sha256", IMAGE.sif_sha256] if IMAGE.sif_sha256 else []),
            ]
        ),
        sif=str(IMAGE.sif),
    shell:
        "controller -m reproval.container stage --image {IMAGE.name:q} --sif {params.sif:q} {params.known}"
        " --out {output.record:q} 2>&1 | tee {log:q}"
