# reproval: evaluates language models so that somebody else, on another cluster, gets the same numbers.
#
#   snakemake --cores 2                      everything, to results/report.html
#   snakemake --cores 2 plan                 what would be done to each model to make it fit, without a GPU
#   snakemake --cores 2 doctor               the traps that cost GPU hours, looked for here and where evaluations run
#   snakemake --cores 1 status               what ran, runs, failed and waits, and how long is left; also while it runs
#   snakemake --cores 2 stage                models and data sets into the store; nothing later needs the network
#   snakemake --cores 2 bundle               all of it but the weights in one archive that another cluster can run from
#   snakemake --cores 2 export               the results for Every Eval Ever, as an RO-Crate, for MLflow and W&B
#   snakemake --cores 2 reproduce --config reference=FILE     a published evaluation, or bundle=FILE, run and judged
#
# What is evaluated, and on what, is in config/config.yaml; config/README.md explains every key.

from snakemake.utils import min_version

min_version("9.27")


# --configfile replaces config/config.yaml; Snakemake would merge them, and evaluate the models of both.
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"


container: CONTAINER


if CONTAINERIZED:

    include: "workflow/rules/container.smk"


include: "workflow/rules/stage.smk"
include: "workflow/rules/plan.smk"


if CONFIG.shards == 1:

    include: "workflow/rules/evaluate.smk"

else:

    include: "workflow/rules/shards.smk"


include: "workflow/rules/status.smk"
include: "workflow/rules/doctor.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/reproduce.smk"
include: "workflow/rules/export.smk"


# On a cluster these run where Snakemake is started: what needs the network, and what takes seconds. Counting the requests
# (find_facts) takes a core for minutes, which a head node is not for, so it is a job, without a GPU.
localrules:
    all,
    stage,
    stage_model,
    stage_weights,
    stage_suite,
    check_store,
    facts,
    plan,
    describe,
    make_plan,
    collect,
    report,
    status,
    doctor_head,
    doctor,
    judge,
    reproduce,
    bundle,
    export,
    export_format,


rule all:
    default_target: True
    input:
        rules.report.output,
        # Of what leads to a file that is there, Snakemake does not miss what somebody removed.
        expand("results/runs/{run}/evaluation.json", run=RUNS),


onsuccess:
    asked = set(workflow.dag_settings.targets) or {"all"}
    if asked & {"all", "report"} and Path(rules.report.output.html).exists():
        print(f"\nReport: {Path(rules.report.output.html).resolve()}")


onerror:
    # What a doctor that was cut off has found would be taken for what there is when it is asked again.
    if "doctor" in workflow.dag_settings.targets:
        for path in Path("results/doctor").glob("*.json"):
            path.unlink()
