# What needs the network: models and data sets, once, into the store.


rule stage:
    # No output: it looks at the store whenever it is asked for.
    input:
        MANIFESTS,
        WEIGHTS.values(),
        IMAGE_RECORD.values(),
    log:
        "logs/stage/store.log",
    container:
        None
    params:
        images=lambda wildcards: " ".join(
            ["--images", *map(shlex.quote, IMAGE_RECORD.values())] if IMAGE_RECORD else []
        ),
    shell:
        'controller -m reproval.store show --snapshot "$REPROVAL_SNAPSHOT" {params.images} 2>&1 | tee {log:q}'


rule check_store:
    # Where Snakemake was started, before a job that asks for a GPU is queued. The note that all is there goes with that
    # job, so that the next one is preceded by a new look.
    input:
        unpack(manifests),
        weights=weights_note,
    output:
        temp("results/runs/{run}/store-checked"),
    log:
        "logs/stage/check-{run}.log",
    container:
        None
    params:
        store=STORE,
        manifests=lambda wildcards, input: [name for name in input if name.endswith(".json")],
    shell:
        "controller -m reproval.store check --store {params.store:q} --out {output:q} {params.manifests:q} 2>&1 | tee {log:q}"


rule describe:
    # One run out of the configuration: what its jobs are told.
    output:
        "results/runs/{run}/run.json",
    log:
        "logs/describe/{run}.log",
    container:
        None
    params:
        digest=lambda wildcards: sha256_json(RUN_FILES[wildcards.run].model_dump(mode="json")),
    shell:
        'controller -m reproval.run_file --snapshot "$REPROVAL_SNAPSHOT" --run {wildcards.run} --out {output:q} 2> {log:q}'


rule stage_model:
    # A model at its commit, or a local folder as it lies there.
    input:
        sampled_weights,
    output:
        f"{STORE}/manifests/models/{{model}}.json",
    log:
        "logs/stage/model-{model}.log",
    container:
        None
    shell:
        'controller -m reproval.stage model --snapshot "$REPROVAL_SNAPSHOT" --key {wildcards.model} --out {output:q}'
        " 2>&1 | tee {log:q}"


rule stage_weights:
    # What a model's manifest promises and its plan does not need.
    input:
        f"{STORE}/manifests/models/{{model}}.json",
    output:
        f"{STORE}/manifests/models/{{model}}.weights",
    log:
        "logs/stage/weights-{model}.log",
    container:
        None
    shell:
        "controller -m reproval.stage weights --manifest {input:q} --out {output:q} 2>&1 | tee {log:q}"


rule stage_suite:
    # The data sets of a suite, by letting lm-eval load every task. In a container it calls Apptainer itself, because it
    # alone needs the network, the caller's token and a store that can be written.
    input:
        **IMAGE_RECORD,
    output:
        f"{STORE}/manifests/suites/{{suite}}.json",
    log:
        "logs/stage/suite-{suite}.log",
    container:
        None
    shell:
        'online_engine -m reproval.stage tasks --snapshot "$REPROVAL_SNAPSHOT" --key {wildcards.suite} --out {output:q}'
        " 2>&1 | tee {log:q}"
