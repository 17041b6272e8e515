# All results, as tables and as one page.


rule collect:
    input:
        expand("results/runs/{run}/evaluation.json", run=RUNS),
    output:
        csv=report("results/scores.csv", caption="../report/scores.rst", category="Scores"),
        parquet="results/scores.parquet",
    log:
        "logs/report/collect.log",
    container:
        None
    shell:
        'controller -m reproval.collect --results results --evaluations "@$REPROVAL_EVALUATIONS"'
        " --csv {output.csv:q} --parquet {output.parquet:q} 2> {log:q}"


rule report:
    input:
        evaluations=expand("results/runs/{run}/evaluation.json", run=RUNS),
        memory=expand("results/runs/{run}/memory.parquet", run=RUNS),
        facts=expand("results/runs/{run}/facts.json", run=RUNS),
        plans=PLANS,
        scores=rules.collect.output,
        manifests=MANIFESTS,
    output:
        html=report("results/report.html", caption="../report/report.rst", category="Report"),
        markdown="results/report.md",
        json="results/report.json",
    log:
        "logs/report/report.log",
    container:
        None
    shell:
        'controller -m reproval.report --results results --evaluations "@$REPROVAL_EVALUATIONS"'
        ' --manifests "@$REPROVAL_MANIFESTS"'
        " --html {output.html:q} --markdown {output.markdown:q} --json {output.json:q} 2> {log:q}"
