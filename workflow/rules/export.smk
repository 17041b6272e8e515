# The results in the formats of others; `export: formats:` says which. The RO-Crate among them is the bundle.

EXPORTS = {name: f"results/exports/{name}" for name in CONFIG.export.formats} | (
    {"ro-crate": "results/bundle.zip"} if "ro-crate" in CONFIG.export.formats else {}
)


def tracker_packages(wildcards):
    """The environment with the libraries of trackers; formats that need none of them have no such input."""
    if wildcards.format not in ("mlflow", "wandb"):
        return []
    if not up_to_date("export"):
        raise WorkflowError(
            f"export.formats: {wildcards.format} needs a library that is not installed, or not as envs/export.txt has "
            f"it\n  mend: {BASE}/envs/install export"
        )
    return []


rule export_format:
    input:
        tracker_packages,
        evaluations=expand("results/runs/{run}/evaluation.json", run=RUNS),
        memory=expand("results/runs/{run}/memory.parquet", run=RUNS),
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
        " --evaluations {input.evaluations:q} --manifests {input.manifests:q} {params.source} --out {output:q}"
        " 2>&1 | tee {log:q}"


rule export:
    input:
        EXPORTS.values(),
