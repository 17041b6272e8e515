# `shards: N` or `auto`: one model's requests over several jobs, which may run at once and anywhere, merged without an engine.

from reproval.files import read_record
from reproval.records import Division


localrules:
    divide,


checkpoint divide:
    # Only the plan tells how long the work takes, and so how many jobs `auto` is.
    input:
        facts="results/runs/{run}/facts.json",
        plan="results/runs/{run}/plan.json",
    output:
        "results/runs/{run}/shards.json",
    log:
        "logs/evaluate/{run}.divide.log",
    container:
        None
    params:
        shards=CONFIG.shards,
    shell:
        "controller -m reproval.shards --shards {params.shards} --plan {input.plan:q} --facts {input.facts:q}"
        " --out {output:q} 2> {log:q}"


rule evaluate_shard:
    # One engine start for its part of all tasks.
    input:
        unpack(manifests),
        run="results/runs/{run}/run.json",
        facts="results/runs/{run}/facts.json",
        plan="results/runs/{run}/plan.json",
        store="results/runs/{run}/store-checked",
    output:
        result="results/runs/{run}/shards/{shard}-of-{shards}.json",
        answers="results/runs/{run}/shards/{shard}-of-{shards}.answers.jsonl.gz",
        memory="results/runs/{run}/shards/{shard}-of-{shards}.memory.parquet",
    log:
        "logs/evaluate/{run}.{shard}-of-{shards}.log",
    wildcard_constraints:
        shard=r"\d+",
        shards=r"\d+",
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
        " --shard {wildcards.shard} --shards {wildcards.shards} --answers {output.answers:q}"
        " --out {output.result:q} --trace {output.memory:q}"


def shards_left(suffix):
    """Input function: what each job of a run leaves, once it is known how many they are."""

    def files(wildcards):
        division = checkpoints.divide.get(run=wildcards.run).output[0]
        count = read_record(Path(division), Division).shards
        return [f"results/runs/{wildcards.run}/shards/{n}-of-{count}{suffix}" for n in range(1, count + 1)]

    return files


rule merge:
    # lm-eval once more, with the shards' answers in place of an engine.
    input:
        unpack(manifests),
        shards=shards_left(".json"),
        answers=shards_left(".answers.jsonl.gz"),
        traces=shards_left(".memory.parquet"),
        run="results/runs/{run}/run.json",
        facts="results/runs/{run}/facts.json",
        plan="results/runs/{run}/plan.json",
    output:
        evaluation="results/runs/{run}/evaluation.json",
        memory="results/runs/{run}/memory.parquet",
    log:
        "logs/evaluate/{run}.log",
    resources:
        mem_mb=lambda wildcards, attempt: 8192 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    shell:
        "engine -m reproval.merge --run {input.run:q} --facts {input.facts:q} --plan {input.plan:q}"
        " --manifest {input.model:q} --results results --shards {input.shards:q}"
        " --out {output.evaluation:q} --trace {output.memory:q} 2>&1 | tee {log:q}"
