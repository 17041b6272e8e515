"""Which jobs a configuration with `shards` makes, before any of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import BASE, Snakemake

CONFIG = str(BASE / "config/demo/config.yaml")


@pytest.mark.parametrize("shards", ["1", "3", "auto"])
def test_only_a_divided_evaluation_has_other_jobs(
    tmp_path: Path, snakemake: Snakemake, demo_model: Path, shards: str
) -> None:
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources/demo").symlink_to(demo_model.parent)
    done = snakemake(tmp_path, "-n", "--configfile", CONFIG, "--config", f"shards={shards}")
    assert done.returncode == 0, done.stdout
    jobs = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) == 2}
    if shards == "1":
        assert jobs.get("evaluate") == "2"
        assert not {"divide", "evaluate_shard", "merge"} & set(jobs)
    else:
        # How many shards there are is known when `divide` has run.
        assert (jobs.get("divide"), jobs.get("merge")) == ("2", "2")
        assert not {"evaluate", "evaluate_shard"} & set(jobs)
