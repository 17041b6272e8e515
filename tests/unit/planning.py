"""Hardware, work and plans that the tests of planning begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from architecture_data import facts

from reproval.memory_model import GIB
from reproval.plan import make_plan
from reproval.records import EngineSettings, Hardware, Plan, TaskFacts
from reproval.settings import ModelConfig
from reproval.tiers import Tiers, load_tiers

ROOT = Path(__file__).parents[2]
TIERS = load_tiers(ROOT / "config" / "tiers.yaml")
ASKED = ModelConfig(path="models/m")
SIZES = (24, 40, 48, 80, 141)


def task(
    kind: str = "loglikelihood",
    requests: int = 56168,
    context: int = 700,
    continuation: int = 1,
    generated: int = 0,
    longest: int = 3000,
    shared: float = 0.75,
) -> TaskFacts:
    usual = min(context + continuation + generated, longest)
    return TaskFacts.model_validate(
        {
            "suite": "s",
            "task": "t",
            "request_type": kind,
            "documents": requests,
            "requests": requests,
            "context_tokens": requests * context,
            "continuation_tokens": requests * continuation,
            "generation_tokens": requests * generated,
            "longest_request_tokens": longest,
            "lengths": {usual: requests - 1, longest: 1} if usual < longest else {longest: requests},
            "unique_prefix_tokens": round(requests * context * (1 - shared)),
            "task_hash": "0" * 64,
            **({"unit": "t"} if "unit" in TaskFacts.model_fields else {}),
        }
    )


CHOICES = task()
ANSWERS = task("generate_until", requests=1319, context=1000, continuation=0, generated=256, longest=2000)


def gpu(gib: float, count: int = 1, capability: str | None = "9.0", name: str = "NVIDIA H100 80GB HBM3") -> Hardware:
    return Hardware(
        gpus=count,
        gpu_memory_bytes=round(gib * GIB),
        gpu_name=name,
        compute_capability=capability,
        host_memory_bytes=128 * GIB,
        cpus=16,
    )


def planned(
    name: str,
    hardware: Hardware,
    tasks: list[TaskFacts] | None = None,
    policy: str = "auto",
    tiers: Tiers = TIERS,
    asked: ModelConfig = ASKED,
    **more: Any,
) -> Plan:
    return make_plan("r", name, facts(name), tasks or [CHOICES], hardware, tiers, policy, asked, 1234, **more)


def reason(plan: Plan, setting: str) -> str:
    return next(entry.text for entry in plan.reasons if entry.setting == setting)


def stock(tokens: int, **more: Any) -> EngineSettings:
    return EngineSettings(
        dtype="bfloat16",
        max_model_len=8192,
        max_num_batched_tokens=tokens,
        max_num_seqs=1024,
        gpu_memory_utilization=0.92,
        enforce_eager=True,
        submit_batch=8192,
        **more,
    )


H100 = gpu(79.65)
