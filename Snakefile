# reproval: evaluates language models so that somebody else, on another cluster, gets the same numbers.
#
#   snakemake --cores 2                      everything, to results/report.html
#   snakemake --cores 2 plan                 what would be done to each model to make it fit, without a GPU
#   snakemake --cores 2 stage                models and data sets into the store; nothing later needs the network
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


include: "workflow/rules/stage.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


localrules:
    all,
    stage,
    facts,
    plan,
    describe,
    make_plan,
    collect,
    report,


rule all:
    default_target: True
    input:
        rules.report.output,


onsuccess:
    if Path(rules.report.output.html).exists():
        print(f"\nReport: {Path(rules.report.output.html).resolve()}")
