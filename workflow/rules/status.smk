# What ran, runs, failed and waits. It has neither input nor output, so no other Snakemake that works here locks it out.


rule status:
    log:
        "logs/status.log",
    container:
        None
    shell:
        'controller -m reproval.status --snapshot "$REPROVAL_SNAPSHOT" --results results 2> {log:q}'
