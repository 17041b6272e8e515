"""A failed rung is followed by one that can help."""

from __future__ import annotations

from typing import Any

import pytest

from reproval import memory
from reproval.records import EngineSettings, MemoryPrediction, Rung
from reproval.supervise import ChildOutcome
from reproval.supervise_ladder import BusyPolicy, climb

NOTHING = MemoryPrediction(
    weights_bytes=0,
    kv_cache_bytes=0,
    activations_bytes=0,
    prompt_logprobs_bytes=0,
    sampler_bytes=0,
    cuda_graphs_bytes=0,
    context_bytes=0,
    peak_bytes=0,
    host_bytes=0,
)
FIRST = EngineSettings(
    dtype="bfloat16",
    max_model_len=4096,
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    gpu_memory_utilization=0.9,
    enforce_eager=False,
    submit_batch=1000,
)


def ladder(*changes: dict[str, Any]) -> list[Rung]:
    """The first rung and, for each of `changes`, one that has these and all changes before it."""
    rungs = [Rung(settings=FIRST, levers=[], predicted=NOTHING)]
    for change in changes:
        settings = rungs[-1].settings.model_copy(update=change)
        rungs.append(Rung(settings=settings, levers=[], predicted=NOTHING))
    return rungs


LADDER = ladder(
    {"submit_batch": 100},
    {"max_num_batched_tokens": 2048},
    {"enforce_eager": True},
    {"gpu_memory_utilization": 0.95},
    {"max_model_len": 2048},
    {"quantization": "fp8"},
)


def outcome(failure: str | None = None) -> ChildOutcome:
    return ChildOutcome(
        finished=failure is None,
        returncode=0 if failure is None else 1,
        signal=None,
        failure=failure,  # type: ignore[arg-type]
        message=failure and f"the line of {failure}",
        interrupted_by=None,
        phases=(),
        trace=memory.Trace(),
        begin="2026-01-01T00:00:00+00:00",
        duration_s=1.0,
        gpu_peak_bytes=None,
        host_peak_bytes=0,
    )


class Script:
    """Stands for the engine: fails in the given ways, one after the other, and then finishes."""

    def __init__(self, *failures: str) -> None:
        self.failures = list(failures)
        self.waited: list[float] = []
        self.said: list[str] = []

    def climb(self, rungs: list[Rung], **more: Any) -> tuple[list[int], bool]:
        def start(settings: EngineSettings, rung: int) -> ChildOutcome:
            assert settings == rungs[rung].settings
            return outcome(self.failures.pop(0) if self.failures else None)

        self.attempts, finished = climb(rungs, start, wait=self.waited.append, say=self.said.append, **more)
        return [attempt.rung for attempt in self.attempts], finished


@pytest.mark.parametrize(
    ("failures", "rungs"),
    [
        ([], [0]),
        (["running"], [0, 2]),
        (["graph_capture"], [0, 3]),
        (["graph_capture", "no_kv_room"], [0, 3, 4]),
        (["no_kv_room"], [0, 2]),
        (["no_kv_room", "no_kv_room"], [0, 2, 3]),
        (["kv_below_one_request"], [0, 2]),
        (["weights_too_big"], [0, 6]),
        (["host_memory"], [0, 1]),
        (["host_memory", "running"], [0, 1, 2]),
        (["running", "running"], [0, 2, 5]),
    ],
)
def test_the_next_rung_is_the_first_that_answers_the_failure(failures: list[str], rungs: list[int]) -> None:
    assert Script(*failures).climb(LADDER) == (rungs, True)


def test_a_job_that_got_more_gpus_begins_with_the_rung_that_needs_them() -> None:
    assert Script("running").climb(LADDER, first=4) == ([4, 5], True)


def test_an_eager_rung_that_fails_like_graph_capture_is_answered_as_running() -> None:
    rungs = [Rung(settings=rung.settings.model_copy(update={"enforce_eager": True}), levers=[], predicted=NOTHING)
             for rung in LADDER]  # fmt: skip
    assert Script("graph_capture").climb(rungs) == ([0, 2], True)


@pytest.mark.parametrize(
    "helps",
    [
        {"kv_cache_memory_bytes": 2**31},
        {"max_model_len": 2048},
        {"kv_cache_dtype": "fp8"},
        {"tensor_parallel_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_cache_of_given_size_that_is_too_small_is_not_answered_by_what_frees_memory(helps: dict[str, Any]) -> None:
    rungs = ladder(
        {"kv_cache_memory_bytes": 2**30},
        {"max_num_seqs": 64, "kv_cache_memory_bytes": 2**29},
        {"max_num_batched_tokens": 2048},
        {"enforce_eager": True},
        {"quantization": "fp8"},
        helps,
    )
    assert Script("kv_below_one_request").climb(rungs, first=1) == ([1, 6], True)
    assert Script("kv_below_one_request").climb(rungs[:6], first=1) == ([1], False)
    assert Script("no_kv_room").climb(rungs, first=1) == ([1, 2], True)


def test_on_a_cpu_machine_host_memory_is_the_engines_own() -> None:
    assert Script("host_memory", "host_memory").climb(LADDER) == ([0, 1], False)
    assert Script("host_memory", "host_memory").climb(LADDER, on_cpu=True) == ([0, 1, 2], True)


@pytest.mark.parametrize("failure", ["not_memory", "deadline", "interrupted"])
def test_what_is_not_of_memory_is_not_tried_again(failure: str) -> None:
    script = Script(failure)
    assert script.climb(LADDER) == ([0], False)
    assert script.attempts[0].outcome == ("interrupted" if failure == "interrupted" else "failed")
    assert script.attempts[0].message == f"the line of {failure}"


def test_a_ladder_without_an_answer_says_so() -> None:
    script = Script("weights_too_big")
    assert script.climb(LADDER[:6]) == ([0], False)
    assert "no later rung answers" in script.said[-1]


def test_a_neighbour_on_the_gpu_is_waited_for_and_named() -> None:
    script = Script("gpu_busy", "gpu_busy")
    assert script.climb(LADDER, holders=lambda: ["GPU 0: pid 7 (python) 70.0 GiB"]) == ([0, 0, 0], True)
    assert script.waited == [15.0, 30.0]
    assert "pid 7 (python)" in script.said[0]


def test_a_neighbour_who_stays_ends_it_with_his_name() -> None:
    script = Script(*["gpu_busy"] * 9)
    policy = BusyPolicy(first_s=10, longest_s=20, limit_s=60)
    rungs, finished = script.climb(LADDER, busy=policy, holders=lambda: ["GPU 0: pid 7 (python) 70.0 GiB"])
    assert not finished
    assert set(rungs) == {0}
    assert sum(script.waited) == 60
    assert max(script.waited) == 20
    assert "pid 7 (python)" in str(script.attempts[-1].message)


def test_nobody_waits_for_ever_with_a_wait_of_zero_limit() -> None:
    assert Script("gpu_busy").climb(LADDER, busy=BusyPolicy(limit_s=0)) == ([0], False)
