"""From facts, hardware and tiers to engine settings that fit: a pure function, with a reason for every choice.

The plan walks through one fixed list of candidates, from the settings that the policy begins with to the most
frugal ones that it allows: fewer GPUs before more, score-neutral levers before score-changing ones. The first
candidate whose predicted peak fits is the plan; those behind it are the ladder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from reproval.files import RecordError, read_record, write_record
from reproval.memory_model import GIB, MIB, Scoring, host_bytes, request_cache_bytes, summarize
from reproval.plan_ladder import (
    Settled,
    divides,
    groups_of,
    ladder_of,
    needed_cache_bytes,
    neutral_steps,
    peak_bytes,
    possible_quantizations,
    prediction,
    pulled,
    settle,
    useful_cache_bytes,
    without_cache_bytes,
)
from reproval.plan_start import Case, Reasons, first_settings, gib, refusal
from reproval.problems import ConfigError
from reproval.records import EngineSettings, Facts, Hardware, ModelFacts, Plan, PulledLever, Reason, Runner, TaskFacts
from reproval.seeds import engine_seed
from reproval.settings import ModelConfig
from reproval.text_table import text_table
from reproval.tiers import TierRule, Tiers, load_tiers
from reproval.time_model import estimate
from reproval.words import UNASKED, some


def make_plan(
    run: str,
    model: str,
    facts: ModelFacts,
    tasks: list[TaskFacts],
    hardware: Hardware,
    tiers: Tiers,
    policy: str,
    asked: ModelConfig,
    seed: int | None,
    scoring: Scoring = "suffix",
    runner: Runner | None = None,
) -> Plan:
    """Plan one model's evaluation.

    `asked` gives dtype, quantization and max_model_len that the user wants; they hold whatever the policy says.
    `scoring` is "suffix" for reproval's own requests and "stock" for lm-eval's, which hold more host memory.
    `runner` is vLLM's model runner: by default V2 on a GPU, and V1 on the CPU, where V2 lacks Triton.
    Where jobs may share a GPU, a model that fits its share with neutral levers alone is planned for that, and any other
    for whole GPUs. Raises ConfigError if the tiers file lacks the policy.
    """
    tier = tiers.tier_of(facts.parameters)
    chosen_policy = tiers.policy(policy)
    case = Case(
        facts=facts,
        work=summarize(tasks),
        tasks=tasks,
        hardware=hardware,
        policy=chosen_policy,
        rule=chosen_policy.tiers.get(tier.name, TierRule()),
        start=chosen_policy.start_of(tier.name),
        tier=tier.name,
        runner=runner or ("v2" if hardware.gpus else "v1"),
        scoring=scoring,
    )
    if hardware.gpus and hardware.jobs_per_gpu > 1:
        shared = _plan(run, model, replace(case, jobs_per_gpu=hardware.jobs_per_gpu), asked, seed, policy)
        if shared.fits:
            return shared
    return _plan(run, model, case, asked, seed, policy)


def _plan(run: str, model: str, case: Case, asked: ModelConfig, seed: int | None, policy: str) -> Plan:
    reasons = Reasons()
    reasons.add(
        "tier",
        case.tier,
        f"{case.facts.parameters / 1e9:.2f} billion parameters are counted in the checkpoint; policy {policy}: "
        f"{case.policy.summary}",
    )
    if case.runner == "v1" and case.hardware.gpus:
        reasons.add("runner", "v1", "VLLM_USE_V2_MODEL_RUNNER=0 where Snakemake was started")
    first, given = first_settings(case, asked, seed, reasons, policy)
    impossible = refusal(case, first.dtype, first.quantization)
    # A share of a GPU is for models that need no more than neutral levers on one GPU: the first group.
    places = list(groups_of(case, first))[: 1 if case.jobs_per_gpu > 1 else None]
    groups = [list(neutral_steps(case, each)) for each in places]
    found = next(
        (
            (place, step, settled)
            for place, group in enumerate(groups if impossible is None else [])
            for step, candidate in enumerate(group)
            if (settled := settle(case, candidate))
        ),
        None,
    )
    common: dict[str, Any] = {
        "run": run,
        "model": model,
        "hardware": case.hardware,
        "policy": policy,
        "tier": case.tier,
        "parameters": case.facts.parameters,
        "jobs_per_gpu": case.jobs_per_gpu,
        "runner": case.runner,
        "sampled_unasked": [f"{task.suite}/{task.task}" for task in case.tasks if task.sampled_unasked],
    }
    if found is None:
        advice = impossible or _advice(case, first)
        return Plan(**common, fits=False, advice=advice, levers=given, reasons=reasons.entries, ladder=[])
    place, step, settled = found
    levers = given + pulled(case, first, settled.settings, _need_text(case, first, settled))
    _amend(reasons, settled.settings, levers)
    _explain(case, settled, reasons)
    return Plan(
        **common,
        fits=True,
        levers=levers,
        reasons=reasons.entries,
        ladder=ladder_of(case, settled, levers, [groups[place][step:], *groups[place + 1 :]]),
        time=estimate(case.facts, case.work, settled.settings, case.hardware),
    )


# --- words ---------------------------------------------------------------------------------------------------------


def _need_text(case: Case, first: EngineSettings, settled: Settled) -> str:
    needed = without_cache_bytes(case, first) + needed_cache_bytes(case, first)
    text = (
        f"without a lever at least {gib(needed)} would be needed and {gib(case.budget_bytes)} may be planned; with "
        f"those pulled, the predicted peak is {gib(peak_bytes(case, settled.predicted))}"
    )
    unknown = case.hardware.compute_capability is None and "fp8" in case.rule.quantizations
    if unknown and settled.settings.quantization == "bitsandbytes":
        text += "; fp8 was not considered, as hardware.compute_capability is not given"
    return text


def _amend(reasons: Reasons, settings: EngineSettings, levers: list[PulledLever]) -> None:
    """Where a lever overruled a choice that had a reason already, the lever's reason takes its place."""
    why = {lever.lever: lever.reason for lever in levers}
    for index, entry in enumerate(reasons.entries):
        final = str(getattr(settings, entry.setting, entry.value))
        if final != entry.value and entry.setting in why:
            reasons.entries[index] = Reason(setting=entry.setting, value=final, text=why[entry.setting])


def _explain(case: Case, settled: Settled, reasons: Reasons) -> None:
    settings, predicted = settled.settings, settled.predicted
    where = "one GPU" if case.hardware.gpus else "the host"
    if case.jobs_per_gpu > 1:
        where = f"the share that one of {case.jobs_per_gpu} jobs has of a GPU"
    reasons.add(
        "tensor_parallel_size",
        settings.tensor_parallel_size,
        f"the fewest of {max(case.hardware.gpus, 1)} that fit: weights take {gib(predicted.weights_bytes)} on {where}",
    )
    reasons.add(
        "max_num_batched_tokens",
        settings.max_num_batched_tokens,
        f"a step then holds {gib(predicted.activations_bytes)} of activations and "
        f"{gib(predicted.prompt_logprobs_bytes)} of prompt logits that vLLM's own profile does not count",
    )
    reasons.add(
        "max_num_seqs",
        settings.max_num_seqs,
        f"the largest task has {case.work.largest_task_requests} requests; sampling for so many takes "
        f"{gib(predicted.sampler_bytes)}",
    )
    one = request_cache_bytes(case.facts, settings, settings.max_model_len, case.block)
    held = f"{gib(predicted.kv_cache_bytes)} of cache; one request of {settings.max_model_len} tokens takes {gib(one)}"
    if settings.kv_cache_memory_bytes is not None:
        useful = useful_cache_bytes(case, settings)
        bound = (
            "all requests of the largest task fit"
            if predicted.kv_cache_bytes > useful - MIB
            else f"the largest task could use {gib(useful)}"
        )
        reasons.add("kv_cache_memory_bytes", settings.kv_cache_memory_bytes, f"{held}, {bound}")
    else:
        reasons.add("gpu_memory_utilization", settings.gpu_memory_utilization, f"vLLM makes of it {held}")
    reasons.add(
        "submit_batch",
        settings.submit_batch,
        f"{case.work.requests} requests of {case.work.mean_tokens:.0f} tokens in the mean; host memory is predicted at "
        f"{gib(predicted.host_bytes)} of {gib(case.hardware.host_memory_bytes)}",
    )
    peak = peak_bytes(case, predicted)
    reasons.add(
        "peak",
        peak,
        f"{gib(peak)} of {gib(case.memory_bytes)} on {where}; {gib(case.memory_bytes - peak)} stay free for "
        f"fragmentation and for what the prediction misses ({case.policy.free_share:.0%} at least)",
    )


def _advice(case: Case, first: EngineSettings) -> str:
    """What would make it fit, with numbers, from the most frugal neutral settings."""
    frugal = list(neutral_steps(case, first))[-1]
    share = 1 - case.policy.free_share
    needed = math.ceil((without_cache_bytes(case, frugal) + needed_cache_bytes(case, frugal)) / share)
    if not case.hardware.gpus:
        return (
            f"{gib(needed)} of host memory would be needed even with the most frugal score-neutral settings; there "
            f"are {gib(case.memory_bytes)}. Give the job {math.ceil(needed / GIB)} GiB of host memory."
        )
    host = host_bytes(frugal, case.work, case.scoring, True)
    if host > case.hardware.host_memory_bytes:
        return (
            f"{gib(host)} of host memory would be needed; there are {gib(case.hardware.host_memory_bytes)}. "
            f"Give the job {math.ceil(host / GIB)} GiB of host memory."
        )
    if needed <= case.memory_bytes:
        predicted = prediction(case, frugal)
        return (
            f"At gpu_memory_utilization {frugal.gpu_memory_utilization} vLLM leaves {gib(predicted.kv_cache_bytes)} "
            f"for the cache, of which {gib(needed_cache_bytes(case, frugal))} are needed, and the predicted peak is "
            f"{gib(predicted.peak_bytes)} of {gib(case.memory_bytes)}. A policy that leaves the utilization to the "
            f"plan, such as auto, would fit it: {gib(needed)} are needed."
        )

    def fits(tp: int, quantization: str | None) -> bool:
        settings = frugal.model_copy(update={"tensor_parallel_size": tp, "quantization": quantization})
        return without_cache_bytes(case, settings) + needed_cache_bytes(case, settings) <= case.budget_bytes

    sentences = [
        f"{gib(needed)} would be needed on one GPU even with the most frugal score-neutral settings that the policy "
        f"allows; there are {gib(case.memory_bytes)} on each of {case.hardware.gpus}."
    ]
    sizes = [n for n in range(2, 65) if divides(case.facts, n)]
    enough = next((n for n in sizes if fits(n, frugal.quantization)), None)
    if enough:
        sentences.append(f"{enough} such GPUs with tensor parallelism would do.")
    if case.facts.quantization is None and frugal.quantization is None:
        methods = [
            name for name in possible_quantizations(case, ["fp8", "bitsandbytes"], frugal.dtype) if fits(1, name)
        ]
        if methods:
            sentences.append(
                f"So would quantization ({' or '.join(methods)}) on one GPU, which changes scores: set "
                "`quantization` for the model, or choose a policy whose tier allows it."
            )
    return " ".join(sentences)


# --- the command ---------------------------------------------------------------------------------------------------


def table(plans: list[Plan]) -> str:
    """What `snakemake plan` prints: a line for each model, and below it what cannot run and what would help.

    Repeats of a model differ in nothing but seeds, and are one line.
    """
    head = ("model", "parameters", "tier", "levers", "predicted peak", "estimated time")
    rows = Counter(_row(plan) for plan in plans)
    named = [(f"{name}, each of {n}" if n > 1 else name, *rest) for (name, *rest), n in rows.items()]
    lines = [text_table(head, named)]
    for refused in dict.fromkeys(f"{plan.model} cannot run. {plan.advice}" for plan in plans if not plan.fits):
        lines += ["", refused]
    marked = dict.fromkeys(plan.model for plan in plans if any(lever.changes_scores for lever in plan.levers))
    if marked:
        lines += ["", f"* changes scores, which are marked in every result: {', '.join(marked)}"]
    if unasked := list(dict.fromkeys(task for plan in plans for task in plan.sampled_unasked)):
        lines += ["", f"Answers will be drawn at random in {some(unasked)}, and {UNASKED}"]
    lines += ["", "All settings, each with its reason: results/runs/RUN/plan.json"]
    return "\n".join(lines)


def _row(plan: Plan) -> tuple[str, ...]:
    levers = ", ".join(
        f"{lever.lever}={lever.after}{'*' if lever.changes_scores else ''}"
        + (f" ({lever.requests_cut} cut)" if lever.requests_cut else "")
        for lever in plan.levers
    )
    size = f"{plan.parameters / 1e9:.2f}B"
    if not plan.fits:
        return plan.model, size, plan.tier, levers or "none", "cannot run", "-"
    predicted, settings = plan.ladder[0].predicted, plan.ladder[0].settings
    if plan.hardware.gpus:
        peak = f"{predicted.peak_bytes / GIB:.1f} of {plan.hardware.gpu_memory_bytes / GIB:.1f} GiB"
        if settings.tensor_parallel_size > 1:
            peak += f" on each of {settings.tensor_parallel_size} GPUs"
    else:
        peak = f"{predicted.host_bytes / GIB:.1f} of {plan.hardware.host_memory_bytes / GIB:.1f} GiB host"
    if plan.time is None:
        return plan.model, size, plan.tier, levers or "none", peak, "-"
    hours = (plan.time.engine_start_s + plan.time.work_s) / 3600
    time = f"{plan.time.gpu_hours:.2f} GPU hours" if plan.hardware.gpus else f"{hours:.2f} hours"
    return plan.model, size, plan.tier, levers or "none", peak, time


def main(arguments: list[str] | None = None) -> int:
    from reproval.run_file import RunFile

    parser = argparse.ArgumentParser(prog="python -m reproval.plan", fromfile_prefix_chars="@", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="Plan one run.")
    make.add_argument("--run", type=Path, required=True, help="The run: model, hardware, policy.")
    make.add_argument("--facts", type=Path, required=True)
    make.add_argument("--tiers", type=Path, required=True)
    make.add_argument("--policy", help="Instead of the run's own.")
    make.add_argument("--runner", choices=get_args(Runner), help="Instead of the model runner that vLLM chooses.")
    make.add_argument("--out", type=Path, required=True)
    show = commands.add_parser("table", help="Print plans as a table.")
    show.add_argument("--strict", action="store_true", help="Exit with 1 if a model cannot run.")
    show.add_argument("plans", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "table":
        plans = [read_record(path, Plan) for path in options.plans]
        print(table(plans))
        return int(options.strict and not all(plan.fits for plan in plans))
    try:
        entry = read_record(options.run, RunFile)
        facts = read_record(options.facts, Facts)
        plan = make_plan(
            run=entry.run.name,
            model=entry.run.model_name,
            facts=facts.model_facts,
            tasks=facts.tasks,
            hardware=entry.hardware,
            tiers=load_tiers(options.tiers),
            policy=options.policy or entry.policy,
            asked=entry.run.model,
            seed=engine_seed(entry.seed),
            runner=options.runner,
        )
    except (ConfigError, RecordError) as error:
        print(error, file=sys.stderr)
        return 2
    write_record(options.out, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
