# The traps that cost GPU hours, looked for where Snakemake was started and where evaluations run.


rule doctor_head:
    # It prints what it finds at once: the job on a node may have to wait for long, or may be refused.
    output:
        "results/doctor/head.json",
    log:
        "logs/doctor/head.log",
    priority: 1
    container:
        None
    params:
        images=lambda wildcards: shlex.join(["--images", *IMAGE_RECORD.values()] if IMAGE_RECORD else []),
        deep="--deep" if CONFIG.doctor == "deep" else "",
        slurm=asked_of_slurm,
    shell:
        'controller -m reproval.doctor here --snapshot "$REPROVAL_SNAPSHOT" --results results {params.images}'
        " {params.deep} {params.slurm} --out {output:q} 2> {log:q}"


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
        nodes=1,
        gpu=CONFIG.hardware.gpus,
        mem_mb=round(CONFIG.hardware.host_memory_gib * 1024),
        runtime=15,
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
        head=rules.doctor_head.output,
        nodes=rules.doctor_node.output,
    log:
        "logs/doctor/table.log",
    # A profile's would run it again after a problem, without what it read.
    retries: 0
    container:
        None
    params:
        container="--container" if IMAGE_RECORD else "",
    shell:
        'controller -m reproval.doctor nodes --snapshot "$REPROVAL_SNAPSHOT" {params.container}'
        " --found {input.head:q} {input.nodes:q} 2> {log:q}"
