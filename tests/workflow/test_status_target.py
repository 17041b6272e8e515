"""`snakemake status` beside another Snakemake that works in the same folder."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from conftest import Snakemake, command, environment

CONFIG = """
models:
  tiny: {hub: organization/tiny, revision: 0123456789abcdef0123456789abcdef01234567}
suites:
  core: {tasks: [arc_easy]}
hardware: {host_memory_gib: 8, cpus: 2}
"""


def test_it_answers_while_another_snakemake_holds_the_lock(tmp_path: Path, snakemake: Snakemake) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/report.html").write_text("an earlier one, which this does not renew")
    lock = tmp_path / ".snakemake/locks"
    # Not the network: what is described first needs none, and there the other one is stopped.
    other = subprocess.Popen(
        command("--configfile", "config.yaml", "--until", "describe", "--", "plan"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not (lock.is_dir() and any(lock.iterdir())) and time.monotonic() < end:
            assert other.poll() is None
            time.sleep(0.005)
        os.kill(other.pid, signal.SIGSTOP)
        assert any(lock.iterdir())
        locked_out = snakemake(tmp_path, "--configfile", "config.yaml", "--", "plan")
        assert "lock" in locked_out.stdout.lower()
        done = snakemake(tmp_path, "--configfile", "config.yaml", "--", "status")
    finally:
        os.kill(other.pid, signal.SIGCONT)
        other.wait(60)
    assert done.returncode == 0, done.stdout
    assert "to be planned  " in done.stdout
    assert "1 run: 1 to be planned." in done.stdout
    assert "Report: " not in done.stdout
