# The traps that cost GPU hours, looked for where Snakemake was started and where evaluations run.


rule doctor_head:
    output:
        "results/doctor/head.json",
    log:
        "logs/doctor/head.log",
    container:
        None
    params:
        store=STORE,
    shell:
        "controller -m reproval.doctor_facts --role head --results results --store {params.store:q} --out {output:q}"
        " 2> {log:q}"


rule doctor_node:
    # A container that cannot be started is a finding, so this job starts it by itself.
    output:
        node="results/doctor/node.json",
        engine="results/doctor/engine.json",
    log:
        "logs/doctor/node.log",
    container:
        None
    threads: CONFIG.hardware.cpus
    resources:
        **{
            "gpu": CONFIG.hardware.gpus,
            "mem_mb": round(CONFIG.hardware.host_memory_gib * 1024),
            **{name: value for name, value in SITE.items() if name not in ("mem_mb", "runtime")},
            "runtime": 15,
        },
    params:
        store=STORE,
    shell:
        "controller -m reproval.doctor_facts --role node --results results --store {params.store:q}"
        " --out {output.node:q} 2> {log:q};"
        " inside -m reproval.doctor_facts --role engine --results results --store {params.store:q}"
        " --out {output.engine:q} 2>> {log:q} || tail -n 20 {log:q} > {output.engine:q}"


rule doctor:
    # No output: it prints its table, and fails if there is a problem. What it read it removes, to look again next time.
    input:
        rules.doctor_head.output,
        rules.doctor_node.output,
    log:
        "logs/doctor/table.log",
    container:
        None
    params:
        asked=lambda wildcards: " ".join(
            [
                *(["--images", *map(shlex.quote, IMAGE_RECORD.values())] if IMAGE_RECORD else []),
                *(["--deep"] if CONFIG.doctor == "deep" else []),
                *(
                    f"--{option} {shlex.quote(str(value))}"
                    for option, name in (("gpu-model", "gpu_model"), ("partition", "slurm_partition"))
                    if (value := SITE.get(name, DEFAULTS.get(name)))
                ),
            ]
        ),
    shell:
        'controller -m reproval.doctor --snapshot "$REPROVAL_SNAPSHOT" {params.asked} -- {input:q} 2> {log:q}'
