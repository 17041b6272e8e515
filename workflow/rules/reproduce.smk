# A published evaluation, or another machine's bundle, run here and judged; and the bundle for the next machine.


rule judge:
    # Settings and prompts first, then every score.
    input:
        against=judged_against,
        evaluations=expand("results/runs/{run}/evaluation.json", run=RUNS),
        plans=PLANS,
    output:
        json="results/reproduction.json",
        markdown="results/reproduction.md",
    log:
        "logs/reproduce/judge.log",
    container:
        None
    params:
        against=" ".join(f"--{kind} {shlex.quote(path)}" for kind, path in AGAINST.items()),
        title=shlex.quote(CONFIG.bundle or ""),
        margin=f"--margin {CONFIG.margin}" if CONFIG.margin else "",
    shell:
        "controller -m reproval.reproduce judge {params.against} --title {params.title} {params.margin}"
        ' --results results --evaluations "@$REPROVAL_EVALUATIONS" --json {output.json:q} --markdown {output.markdown:q}'
        " 2> {log:q}"


rule reproduce:
    # No output: it prints the verdicts, and fails unless every score is identical or reproduced. They stay in
    # results/reproduction.{json,md} either way.
    input:
        json=rules.judge.output.json,
        report=rules.report.output,
    log:
        "logs/reproduce/reproduce.log",
    container:
        None
    shell:
        "controller -m reproval.reproduce show {input.json:q} 2> {log:q}"


rule bundle:
    # One archive that another cluster can run from.
    input:
        evaluations=expand("results/runs/{run}/evaluation.json", run=RUNS),
        memory=expand("results/runs/{run}/memory.parquet", run=RUNS),
        report=rules.report.output,
        scores=rules.collect.output,
        manifests=MANIFESTS,
        sbom=str(SBOM) if SBOM else [],
    output:
        "results/bundle.zip",
    log:
        "logs/reproduce/bundle.log",
    container:
        None
    params:
        base=str(BASE),
        sbom=f"--sbom {shlex.quote(str(SBOM))}" if SBOM else "",
    shell:
        'controller -m reproval.bundle make --results results --evaluations "@$REPROVAL_EVALUATIONS"'
        ' --manifests "@$REPROVAL_MANIFESTS"'
        " {params.sbom} --base {params.base:q} --out {output:q} 2>&1 | tee {log:q}"
