"""A job on the real engine whose attempts fail in every way that a CPU can show, each answered by a rung that helps.

CUDA graphs and a neighbour on the GPU are for tests/gpu/ladder_bench.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from demo_project import BASE, MODEL, SETTINGS, Job, Project

from reproval import keep
from reproval.files import read_record
from reproval.records import Evaluation, MemoryPrediction, PulledLever, Rung

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="needs the demo's model: make model"),
    pytest.mark.timeout(900),
]

# Read by every Python of the job. In the engine's it makes vLLM fail where `failures` says so, one line an attempt; the
# frames of the traceback above are vLLM's own.
INJECTOR = """
import importlib.util, os, signal, sys
from pathlib import Path

FOLDER, MODULE = Path(__file__).parent, "vllm.v1.worker.cpu_worker"


def fail(where):
    import torch

    if where == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.53 GiB.")


def patch(module):
    lines = (FOLDER / "failures").read_text().split("\\n")
    (FOLDER / "failures").write_text("\\n".join(lines[1:]))
    where, _, after = lines[0].partition(" ")
    owner, name = {
        "load_model": (module.CPUModelRunner, "load_model"),
        "determine_available_memory": (module.CPUWorker, "determine_available_memory"),
        "execute_model": (module.CPUModelRunner, "execute_model"),
        "killed": (module.CPUModelRunner, "execute_model"),
    }.get(where, (None, ""))
    if owner is None:
        return
    real, calls = getattr(owner, name), iter(range(int(after or 0)))

    def called(*arguments, **more):
        if next(calls, None) is None:
            fail(where)
        return real(*arguments, **more)

    setattr(owner, name, called)


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module))
        return spec


if "reproval.engine" in sys.orig_argv:
    sys.meta_path.insert(0, Finder)
"""

# What an attempt does, its class, and the settings of the rung that comes after it.
STORY: list[tuple[str, str | None, dict[str, Any]]] = [
    ("load_model", "weights_too_big", {"dtype": "bfloat16"}),
    ("determine_available_memory", "no_kv_room", {"max_num_batched_tokens": 512, "kv_cache_memory_bytes": 2**22}),
    ("", "kv_below_one_request", {"kv_cache_memory_bytes": 2**27}),
    ("execute_model 3", "running", {"max_num_seqs": 8}),
    ("killed 2", "host_memory", {"submit_batch": 4}),
    ("", None, {}),
]
"""execute_model and killed: after so many steps."""


def test_every_failure_of_memory_is_answered_and_the_job_ends_with_all_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(("demo_opposites", "demo_endings", "demo_counting"))
    rungs, settings = [project.plan.ladder[0]], SETTINGS
    changes = [change for _, _, change in STORY if change]
    # One that helps against nothing that happens first: it is passed over.
    for change in ({"submit_batch": 12}, *changes):
        before, settings = settings, settings.model_copy(update=change)
        levers = [
            PulledLever(
                lever="dtype", before=before.dtype, after="bfloat16", reason="", changes_scores=True, requests_cut=0
            )
        ]
        nothing = MemoryPrediction(**dict.fromkeys(MemoryPrediction.model_fields, 0))
        rungs.append(Rung(settings=settings, levers=levers if "dtype" in change else [], predicted=nothing))
    project.plan = project.plan.model_copy(update={"ladder": rungs})
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(INJECTOR, encoding="utf-8")
    (hook / "failures").write_text("\n".join(where for where, _, _ in STORY), encoding="utf-8")
    job = Job(tmp_path, project)
    code = job.start(PYTHONPATH=f"{BASE / 'workflow'}:{hook}").wait(800)
    assert code == 0, (tmp_path / "job.log").read_text()[-3000:]

    evaluation = read_record(tmp_path / "evaluation.json", Evaluation)
    assert [attempt.failure for attempt in evaluation.attempts] == [failure for _, failure, _ in STORY]
    assert [attempt.rung for attempt in evaluation.attempts] == [0, 2, 3, 4, 5, 6]
    assert all(attempt.message for attempt in evaluation.attempts[:-1])
    # What was answered before an engine failed is not asked again by the next.
    assert max(Counter(job.answers()).values()) == 1
    monkeypatch.chdir(tmp_path)
    for reference in evaluation.units:
        result = keep.find(Path("results") / reference.folder, reference.key)
        assert result is not None
        assert [lever.after for lever in result.score_levers] == ["bfloat16"]
