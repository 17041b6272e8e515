# The image of --use-singularity, once, in the store: pulled by digest or found as a file, and hashed.


localrules:
    stage_image,


rule stage_image:
    input:
        [] if IMAGE.pulled else str(IMAGE.sif),
    output:
        # Not the image, which Snakemake would remove before a registry is known to answer; and what is known of it stays
        # to be compared with it.
        record=update(str(IMAGE.record)),
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
    shell:
        # The path of the image is no parameter: a project that has moved need not stage again.
        "controller -m reproval.container stage --image {IMAGE.name:q} --sif {IMAGE.sif:q} {params.known}"
        " --out {output.record:q} 2>&1 | tee {log:q}"
