"""What a job asks the scheduler for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from examples import engine_settings

from reproval import resources
from reproval.files import write_record
from reproval.records import Attempt, Attempts, Hardware, MemoryPrediction, Plan, Rung, TimeEstimate
from reproval.supervise_ladder import BusyPolicy

GIB = 2**30


def rung(tp: int = 1, host_gib: float = 8, **changes: Any) -> Rung:
    parts = dict.fromkeys(
        (
            "weights_bytes",
            "kv_cache_bytes",
            "activations_bytes",
            "prompt_logprobs_bytes",
            "sampler_bytes",
            "cuda_graphs_bytes",
            "context_bytes",
            "peak_bytes",
        ),
        0,
    )
    return Rung(
        settings=engine_settings(tensor_parallel_size=tp, **changes),
        levers=[],
        predicted=MemoryPrediction(**parts, host_bytes=round(host_gib * GIB)),
    )


def plan(*ladder: Rung, gpus: int = 4, host_gib: float = 64, work_s: float | None = 3600) -> Plan:
    return Plan(
        run="m-0",
        model="m",
        hardware=Hardware(gpus=gpus, gpu_memory_bytes=80 * GIB, host_memory_bytes=round(host_gib * GIB), cpus=4),
        policy="auto",
        tier="above-13B",
        parameters=1,
        fits=bool(ladder),
        levers=[],
        reasons=[],
        ladder=list(ladder),
        time=None if work_s is None else TimeEstimate(engine_start_s=100, work_s=work_s, gpu_hours=1),
    )


def failed(made: Plan, number: int, failure: Any = "running", outcome: Any = "failed") -> Attempt:
    return Attempt(
        rung=number,
        settings=made.ladder[number].settings,
        outcome=outcome,
        failure=failure,
        begin="2026-01-01T00:00:00+00:00",
        duration_s=1,
        gpu_peak_bytes=None,
        host_peak_bytes=0,
        phases=[],
    )


# As the planner orders them: neutral steps on the fewest GPUs, more GPUs, and then what changes scores.
LADDER = plan(rung(), rung(max_num_seqs=64), rung(2, max_num_seqs=64), rung(max_num_seqs=64, max_model_len=128))


def test_a_job_has_its_share_of_the_cores_by_its_gpus() -> None:
    node = plan(rung(2)).model_copy(
        update={"hardware": Hardware(gpus=8, gpu_memory_bytes=80 * GIB, host_memory_bytes=64 * GIB, cpus=128)}
    )
    assert resources.cpus(node) == 32
    assert resources.cpus(node.model_copy(update={"jobs_per_gpu": 4})) == 8
    assert resources.cpus(node.model_copy(update={"ladder": []})) == 1
    small = Hardware(gpus=8, gpu_memory_bytes=80 * GIB, host_memory_bytes=64 * GIB, cpus=4)
    assert resources.cpus(plan(rung()).model_copy(update={"hardware": small})) == 1
    assert resources.cpus(plan(rung(), gpus=0)) == 4


def test_a_job_asks_for_the_tensor_parallel_size_of_its_plan_and_none_on_a_cpu() -> None:
    assert resources.gpus(plan(rung(2))) == 2
    assert resources.gpus(plan(rung(), gpus=0)) == 0


def test_a_job_stops_at_the_rung_that_needs_more_gpus_than_it_has() -> None:
    assert resources.end_rung(LADDER, 0, gpus=1) == 2
    assert resources.end_rung(LADDER, 0, gpus=2) == 4


def test_the_next_job_asks_for_more_gpus_only_if_memory_of_the_gpu_was_what_failed() -> None:
    history = [failed(LADDER, 0), failed(LADDER, 1)]
    assert resources.gpus(LADDER, history) == 2
    assert resources.first_rung(LADDER, history) == 2
    for other in ("not_memory", "deadline", "host_memory"):
        assert resources.gpus(LADDER, [failed(LADDER, 1, other)]) == 1
    assert resources.gpus(LADDER, [failed(LADDER, 1, "interrupted", "interrupted")]) == 1


def test_a_gpu_that_a_neighbour_holds_is_no_reason_to_ask_for_more() -> None:
    made = plan(rung(gpu_memory_utilization=0.9), rung(2, gpu_memory_utilization=0.8))
    assert resources.gpus(made, [failed(made, 0, "gpu_busy")]) == 1
    assert resources.gpus(made, [failed(made, 0)]) == 2


def test_a_job_that_was_interrupted_on_more_gpus_gets_them_again() -> None:
    history = [failed(LADDER, 1), failed(LADDER, 2, "interrupted", "interrupted")]
    assert resources.gpus(LADDER, history) == 2
    assert resources.first_rung(LADDER, history) == 2


def test_attempts_of_another_plan_do_not_count() -> None:
    other = plan(rung(), rung(max_num_seqs=32), rung(4))
    assert resources.gpus(LADDER, [failed(other, 1)]) == 1
    assert resources.gpus(plan(rung()), [failed(LADDER, 3)]) == 1


def test_memory_is_the_prediction_with_a_margin_and_more_at_each_attempt_up_to_what_a_job_may_have() -> None:
    made = plan(rung(host_gib=8), rung(host_gib=16), host_gib=64)
    assert [resources.mem_mib(made, attempt) for attempt in (1, 2, 3, 4)] == [21504, 32256, 48384, 65536]
    assert resources.mem_mib(plan(rung(host_gib=60), host_gib=64)) == 64 * 1024


def test_time_is_the_estimate_with_a_margin_and_more_at_each_attempt() -> None:
    made = plan(rung())
    assert [resources.runtime_min(made, attempt) for attempt in (1, 2, 3)] == [149, 298, 447]
    assert resources.runtime_min(plan(rung(), work_s=None)) == 25


def test_a_job_with_a_gpu_has_the_time_to_wait_for_it() -> None:
    with_gpu, without = (resources.runtime_min(plan(rung(), gpus=gpus)) for gpus in (1, 0))
    assert (with_gpu - without) * 60 == sum(BusyPolicy().waits())


def test_a_model_that_does_not_fit_costs_no_gpu_to_say_so() -> None:
    unfit = plan(work_s=None)
    assert (resources.gpus(unfit), resources.mem_mib(unfit), resources.runtime_min(unfit)) == (0, 1024, 15)


def test_a_plan_that_is_not_there_yet_is_named_as_snakemake_named_it(tmp_path: Path) -> None:
    name = str(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError) as error:
        resources.read_plan(name)
    assert error.value.filename == name


def test_a_plan_that_was_made_again_is_read_again(tmp_path: Path) -> None:
    name = tmp_path / "plan.json"
    for tp in (1, 2):
        write_record(name, plan(rung(tp)))
        assert resources.gpus(resources.read_plan(str(name))) == tp


def test_attempts_are_read_from_the_folder_of_the_run(tmp_path: Path) -> None:
    assert resources.read_history(tmp_path) == []
    write_record(tmp_path / "attempts.json", Attempts(attempts=[failed(LADDER, 1)]))
    assert resources.gpus(LADDER, resources.read_history(tmp_path)) == 2
