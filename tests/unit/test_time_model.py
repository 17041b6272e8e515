"""The estimate of time: what was measured, and what the data sheets say."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from architecture_data import facts
from planning import CHOICES, H100, ROOT, planned, stock, task

from reproval.memory_model import (
    GIB,
    summarize,
)
from reproval.records import Hardware
from reproval.time_model import estimate, gpu_speed

MEASURED = yaml.safe_load((ROOT / "tests/unit/measured_rates.yaml").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']}-{row['requests']}-{row['mode']}")
def test_measured_generation_is_reproduced_by_the_estimate(row: dict[str, Any]) -> None:
    """H100s, requests of 500 and 256 tokens, all running at once: each of several runs within a factor of 1.8."""
    n = row["requests"]
    work = summarize([task("generate_until", n, 500, 0, generated=256, longest=756, shared=0)])
    chosen = stock(8192).model_copy(update={"enforce_eager": row["mode"] == "eager", "max_num_seqs": 1024})
    estimated = n * 256 / estimate(facts(row["model"]), work, chosen, H100).work_s
    for rate in row["tokens_per_s"]:
        assert 1 / 1.8 < estimated / rate < 1.8


def test_measured_speed_on_two_cores_is_reproduced_by_the_estimate() -> None:
    """450 tokens/s with a 135M model; 234 short requests took 24 s, most of it neither arithmetic nor the start."""
    cores = Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)
    few, many = (
        summarize([task(requests=n, context=tokens, continuation=0, longest=tokens, shared=0.0)])
        for n, tokens in ((10, 4500), (234, 10))
    )
    assert 45_000 / estimate(facts("SmolLM2-135M"), few, stock(4096), cores).work_s == pytest.approx(450, rel=0.05)
    assert estimate(facts("SmolLM2-135M"), many, stock(4096), cores).work_s == pytest.approx(24, rel=0.05)
    eight = cores.model_copy(update={"cpus": 8})
    found = [estimate(facts("SmolLM2-135M"), few, stock(4096), each) for each in (cores, eight)]
    assert found[0].work_s / found[1].work_s == pytest.approx(4, rel=0.05)
    assert [time.gpu_hours for time in found] == [0, 0]
    assert found[0].engine_start_s == pytest.approx(30, rel=0.05)


def test_requests_take_a_millisecond_of_python_however_fast_the_gpu_is() -> None:
    many = summarize([task(requests=100_000, context=1, longest=2)])
    assert estimate(facts("SmolLM2-135M"), many, stock(8192), H100).work_s == pytest.approx(100, rel=0.05)


def test_measured_starts_of_an_engine() -> None:
    """On H100s with a 4B model and dummy weights, 35 s eager and 93 to 140 s with graphs; real ones are also read."""
    eager, graphs = (
        planned("Qwen3-4B", H100, [work]).time
        for work in (CHOICES, task("generate_until", 20_000, 500, 0, generated=256, longest=800))
    )
    assert eager is not None
    assert graphs is not None
    assert 93 - 35 < graphs.engine_start_s - eager.engine_start_s < 140 - 35
    assert 35 < eager.engine_start_s < 50


@pytest.mark.parametrize(
    ("name", "teraflops", "terabytes"),
    [
        ("NVIDIA B200", 2250, 8.0),
        ("NVIDIA H200", 989, 4.8),
        ("NVIDIA H100 80GB HBM3", 989, 3.35),
        ("NVIDIA A100-SXM4-80GB", 312, 2.0),
        ("NVIDIA L40S", 362, 0.864),
        ("NVIDIA L40", 181, 0.864),
        ("NVIDIA L4", 121, 0.3),
        ("NVIDIA A10", 125, 0.6),
        ("nvidia geforce rtx 4090", 165, 1.0),
        ("Tesla T4", 65, 0.3),
        (None, 312, 2.0),
    ],
)
def test_the_speed_of_a_gpu_is_its_data_sheet_s(name: str | None, teraflops: float, terabytes: float) -> None:
    assert gpu_speed(name) == (teraflops * 1e12, terabytes * 1e12)


def test_time_of_work_goes_down_with_gpus_and_hours_count_all_of_them() -> None:
    one, two = (
        estimate(
            facts("Qwen3-32B"),
            summarize([task(requests=10_000, context=1000, longest=1001, shared=0.0)]),
            stock(8192).model_copy(update={"tensor_parallel_size": gpus}),
            H100,
        )
        for gpus in (1, 2)
    )
    assert one.work_s / two.work_s == pytest.approx(2, rel=0.02)
    assert one.engine_start_s == two.engine_start_s, "the files are read once in all"
    assert two.gpu_hours == pytest.approx(2 * (two.engine_start_s + two.work_s) / 3600, rel=0.01)


def test_a_mixture_of_experts_computes_what_a_token_meets() -> None:
    """Qwen3-30B-A3B: 3.3 of 30.5 billion parameters."""
    work = summarize([task(requests=10_000, context=1000, longest=1001, shared=0.0)])
    dense, sparse = (estimate(facts(name), work, stock(8192), H100).work_s for name in ("Qwen3-32B", "Qwen3-30B-A3B"))
    assert dense > 8 * sparse


def test_generation_takes_longer_where_the_cache_holds_few_requests() -> None:
    """A request of Qwen3-4B with 500 to 756 tokens takes 71 to 106 MiB."""
    answers = summarize([task("generate_until", 1000, 500, 0, generated=256, longest=756, shared=0)])

    def seconds(gib: float, requests: int = 1024) -> float:
        cache = {"kv_cache_memory_bytes": round(gib * GIB), "max_num_seqs": requests}
        return estimate(facts("Qwen3-4B"), answers, stock(8192).model_copy(update=cache), H100).work_s

    assert seconds(1) > 3 * seconds(4)
    assert seconds(60, requests=10) == pytest.approx(seconds(1), rel=0.25)
    assert seconds(60) < seconds(4)
