# What is known of a model and its tasks, and what follows from it: on the CPU, before a GPU is asked for.


rule facts:
    input:
        expand("results/runs/{run}/facts.json", run=RUNS),


rule find_facts:
    input:
        unpack(manifests),
        run="results/runs/{run}/run.json",
    output:
        "results/runs/{run}/facts.json",
    log:
        "logs/facts/{run}.log",
    resources:
        mem_mb=lambda wildcards, attempt: 4096 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    shell:
        "engine -m reproval.facts --run {input.run:q} --manifest {input.model:q} --tasks {input.tasks:q} --results results"
        " --out {output:q} > {log:q} 2>&1"


rule make_plan:
    input:
        run="results/runs/{run}/run.json",
        facts="results/runs/{run}/facts.json",
        tiers=TIERS,
    output:
        "results/runs/{run}/plan.json",
    log:
        "logs/plan/{run}.log",
    container:
        None
    # The engine gets it from the plan, so that what was predicted is what runs, in a container and on another node too.
    params:
        runner="--runner v1" if CONFIG.hardware.gpus and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0" else "",
    shell:
        "controller -m reproval.plan make --run {input.run:q} --facts {input.facts:q} --tiers {input.tiers:q}"
        " {params.runner} --out {output:q} 2> {log:q}"


rule plan:
    # No output: it prints its table whenever it is asked for.
    input:
        PLANS,
    log:
        "logs/plan/table.log",
    container:
        None
    shell:
        'controller -m reproval.plan table "@$REPROVAL_PLANS" 2> {log:q}'
