# One job a model: one engine start for all its tasks.


rule evaluate:
    input:
        unpack(manifests),
        run="results/runs/{run}/run.json",
        facts="results/runs/{run}/facts.json",
        plan="results/runs/{run}/plan.json",
        store="results/runs/{run}/store-checked",
    output:
        evaluation="results/runs/{run}/evaluation.json",
        memory="results/runs/{run}/memory.parquet",
    log:
        "logs/evaluate/{run}.log",
    threads: planned_cpus
    resources:
        **SHARED_GPU,
        # GPUs of several nodes are of no use to an engine on one.
        nodes=1,
        gpu=planned_gpus,
        mem_mb=planned_mem_mb,
        runtime=planned_runtime,
    shell:
        "evaluate --run {input.run:q} --facts {input.facts:q} --plan {input.plan:q}"
        " --manifest {input.model:q} --results results --log {log:q} --gpus {resources.gpu}"
        " --out {output.evaluation:q} --trace {output.memory:q}"
