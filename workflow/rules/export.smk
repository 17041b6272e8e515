# The results in the formats of others; `export: formats:` says which. The RO-Crate among them is the bundle.


rule export_format:
    input:
        tracker_packages,
        evaluations=expand("results/runs/{run}/evaluation.json", run=RUNS),
        memory=expand("results/runs/{run}/memory.parquet", run=RUNS),
        plans=PLANS,
        manifests=MANIFESTS,
    output:
        directory("results/exports/{format}"),
    log:
        "logs/export/{format}.log",
    wildcard_constraints:
        format="every-eval-ever|mlflow|wandb",
    container:
        None
    params:
        packages=str(BASE / ".env/export"),
        source=shlex.join(
            [
                f"--organization={CONFIG.export.organization}",
                f"--relationship={CONFIG.export.relationship}",
                *([f"--organization-url={CONFIG.export.organization_url}"] if CONFIG.export.organization_url else []),
                *(["--samples"] if CONFIG.export.samples else []),
            ]
        ),
    shell:
        'PYTHONPATH="$PYTHONPATH:"{params.packages:q} controller -m reproval.export {wildcards.format} --results results'
        ' --evaluations "@$REPROVAL_EVALUATIONS" --manifests "@$REPROVAL_MANIFESTS" {params.source} --out {output:q}'
        " 2>&1 | tee {log:q}"


rule export:
    input:
        EXPORTS.values(),
