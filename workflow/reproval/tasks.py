"""lm-eval's tasks with the settings of a unit, for the stages that look at them without a model.

`simple_evaluate` applies a caller's settings to the tasks that it loads, and offers no way to do only that.
`prepare` makes the same changes in the same order (lm_eval/evaluator.py, lm-eval 0.4.13); a test holds the requests
that come out of both together.
"""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from reproval.seeds import Seed, seeds
from reproval.settings import Generation, TaskSettings, Unit
from reproval.shards import ANSWER_KEYS

CODE_ALLOWED = "HF_ALLOW_CODE_EVAL"
# The metrics that lm-eval computes of each kind of task (ConfigurableTask.process_results); it passes over any other.
COMPUTED = {
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": (
        "acc",
        "acc_norm",
        "acc_bytes",
        "acc_mutual_info",
        "exact_match",
        "f1",
        "mcc",
        "brier_score",
        "likelihood",
    ),
}
RUNS_CODE = "it runs code that the model writes; write unsafe_code: true into the suite if that may be"


@cache
def manager(include_path: str | None) -> Any:
    """A TaskManager that knows lm-eval's tasks and those of a folder; its index takes seconds to build."""
    from lm_eval import utils
    from lm_eval.tasks import TaskManager

    # lm-eval compiles the template of a prompt again for every document and every example of every prompt: nine tenths
    # of the time that it takes to build requests. A compiled template has no state.
    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = lru_cache(maxsize=4096)(utils.env.from_string)
    return TaskManager(include_path=include_path)


def chat_arguments(settings: TaskSettings) -> dict[str, Any]:
    """The chat arguments of simple_evaluate; what the user left open has lm-eval's default."""
    return {
        "system_instruction": settings.system_instruction,
        "apply_chat_template": settings.apply_chat_template or False,
        "fewshot_as_multiturn": settings.fewshot_as_multiturn if settings.fewshot_as_multiturn is not None else True,
    }


def known_names(units: Iterable[Unit]) -> None:
    """Raises TaskError that tells of every name at once which lm-eval does not know."""
    if unknown := [str(error) for unit in units if (error := _unknown(unit))]:
        raise TaskError("\n".join(unknown))


def _unknown(unit: Unit) -> UnknownTask | None:
    tasks = manager(unit.include_path)
    return None if tasks.match_tasks([unit.task]) else UnknownTask(unit, list(tasks.all_tasks))


def prepare(unit: Unit, seed: Seed) -> dict[str, Any]:
    """Load a unit's leaf tasks and apply its settings. Returns lm-eval Task objects by name.

    Raises UnknownTask for a name that lm-eval does not know, TaskError for what it cannot load or this project not
    evaluate, and OSError where a data set cannot be had. Loading reads the data sets: from the network in `stage`, from
    the store afterwards.
    """
    allow_code(unit)
    if unknown := _unknown(unit):
        raise unknown
    tasks = manager(unit.include_path)
    at = f"suites.{unit.suite}.tasks: {unit.task}"
    try:
        loaded: dict[str, Any] = tasks.load([unit.task])["tasks"]
    except OSError:
        raise
    except Exception as error:
        path = getattr(tasks.task_index.get(unit.task), "yaml_path", None)
        told = next(_unknown_members(unit.task, tasks), None) or _reason(error)
        raise TaskError(f"{at}: lm-eval cannot load it{f' from {path}' if path else ''}: {told}") from error
    for name, task in loaded.items():
        if len(files := _defining(unit.include_path, name)) > 1:
            raise TaskError(
                f"suites.{unit.suite}.tasks: {name}: {' and '.join(map(str, files))} define it; expected one file, "
                "since lm-eval takes the first; rename the other"
            )
        _refuse(unit, name, task)
    settings = unit.settings
    for task in loaded.values():
        if settings.generation and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(settings.generation), update=True)
        if settings.num_fewshot is not None:
            # A task that fixes zero shots keeps them.
            if task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seeds(seed)["fewshot_random_seed"])
    return loaded


def _meant(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown_members(name: str, tasks: Any) -> Iterator[str]:
    """Names in a group's file that nobody defines; lm-eval takes them for tasks, and misses their data set."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = tasks.task_index.get(name)
    if entry is None or entry.kind.name != "GROUP" or entry.yaml_path is None:
        return
    members = load_yaml(entry.yaml_path, resolve_func=False).get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str) and member in tasks.task_index:
            yield from _unknown_members(member, tasks)
        elif isinstance(member, str):
            yield f"{entry.yaml_path} names {member!r}, which is no task, group or tag{_meant(member, tasks.all_tasks)}"


def _reason(error: BaseException) -> str:
    """Why a task cannot be loaded, with what is behind an error that says only that there was one."""
    if isinstance(error, StopIteration):
        return "its data set holds no documents"
    if isinstance(error, KeyError) and error.args == (None,):
        return (
            "a metric of its metric_list is none of lm-eval's; correct the name, or give it an `aggregation:` as well"
        )
    told = f"{type(error).__name__}: {error}"
    frames = [
        each for each in traceback.extract_tb(error.__traceback__) if each.filename.endswith("lm_eval/api/task.py")
    ]
    if frames and isinstance(error, LookupError | TypeError):
        told += f", in {frames[-1].name} at `{frames[-1].line}`"
    while error.__cause__ is not None:
        error = error.__cause__
        told += f": {error}"
    return RUNS_CODE if CODE_ALLOWED in told else told


def allow_code(unit: Unit) -> None:
    """Let the metric of a unit that may run code do so: it asks for a variable, which no container passes on."""
    if unit.unsafe_code:
        os.environ[CODE_ALLOWED] = "1"


def _refuse(unit: Unit, name: str, task: Any) -> None:
    """Raise TaskError for what simple_evaluate would refuse only with an engine running."""
    if getattr(task, "UNSAFE_CODE", False) and not unit.unsafe_code:
        raise TaskError(f"suites.{unit.suite}.tasks: {name}: {RUNS_CODE}")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"suites.{unit.suite}.tasks: {name}: asks about images or sound; expected a task of text alone")
    if task.get_config("output_type") == "generate_until":
        _refuse_generation(
            f"suites.{unit.suite}.tasks: {name}: generation_kwargs", task.get_config("generation_kwargs")
        )
    if not callable(task.get_config("process_results")):
        _refuse_metrics(f"suites.{unit.suite}.tasks: {name}: metric_list", task)


def _refuse_generation(at: str, generation: Mapping[str, Any] | None) -> None:
    """Raise TaskError for what the engine would refuse at the first answer."""
    known = {*Generation.model_fields, *ANSWER_KEYS}
    given = generation or {}
    if "thinking_token_budget" in given:
        raise TaskError(
            f"{at}: thinking_token_budget needs a reasoning parser, which no model is given here; delete it, and limit "
            "answers by max_gen_toks"
        )
    if others := sorted(given.keys() - known):
        from vllm import SamplingParams  # takes seconds

        for key in others:
            if not hasattr(SamplingParams, key):
                raise TaskError(f"{at}: {key!r} is nothing that vLLM knows{_meant(key, known)}")
    until = given.get("until")
    if not isinstance(until, str | None) and not (
        isinstance(until, list) and all(isinstance(text, str) for text in until)
    ):
        raise TaskError(f"{at}: until is {until!r}; expected text or a list of text, in quotes")


def _refuse_metrics(at: str, task: Any) -> None:
    """Raise TaskError for a metric that lm-eval would miss when everything is answered, or leave out in silence."""
    kind = task.get_config("output_type")
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        computed = COMPUTED.get(kind)
        if computed is not None and metric not in computed:
            raise TaskError(
                f"{at}: {metric!r} is not computed for output_type: {kind}; expected one of {', '.join(computed)}"
                + _meant(metric, computed)
            )
        if function is None:
            raise TaskError(f"{at}: {metric!r} is no metric of lm-eval's, nor one that `evaluate` has in the store")
    for metric, aggregation in getattr(task, "_aggregation_list", {}).items():
        if aggregation is None:
            raise TaskError(f"{at}: {metric!r} has an aggregation that lm-eval does not know; most are `mean`")


def built(unit: Unit, seed: Seed, model: Any) -> dict[str, Any]:
    """A unit's leaf tasks with their requests, as simple_evaluate builds them for `model`. Raises as `prepare` does."""
    import numpy as np
    from lm_eval.evaluator_utils import get_sample_size

    # Loading a task and building a prompt may draw numbers (shuffled choices): start where simple_evaluate starts.
    asked = seeds(seed)
    random.seed(asked["random_seed"])
    np.random.seed(asked["numpy_random_seed"])
    chat = chat_arguments(unit.settings)
    tasks = prepare(unit, seed)
    with named_template(model, unit):
        for name, task in tasks.items():
            try:
                task.build_all_requests(
                    limit=get_sample_size(task, unit.settings.limit),
                    rank=0,
                    world_size=1,
                    chat_template=model.apply_chat_template if chat["apply_chat_template"] else None,
                    tokenizer_name=model.tokenizer_name if chat["apply_chat_template"] else "",
                    **{**chat, "apply_chat_template": bool(chat["apply_chat_template"])},
                )
            except Exception as error:
                told = _reason(error)
                if "Sample larger than population" in told:
                    told = f"num_fewshot is {task.get_config('num_fewshot')}, and there are fewer examples to draw from"
                raise TaskError(
                    f"suites.{unit.suite}.tasks: {name}: lm-eval cannot build its requests: {told}"
                ) from error
    if _is_own(unit):
        for name, task in tasks.items():
            _refuse_targets(unit, name, task)
    return tasks


def _is_own(unit: Unit) -> bool:
    """Whether a unit's task or group is one of the user's; those of lm-eval are as they were published."""
    path = getattr(manager(unit.include_path).task_index.get(unit.task), "yaml_path", None)
    return bool(path and unit.include_path and Path(path).resolve().is_relative_to(Path(unit.include_path).resolve()))


def _refuse_targets(unit: Unit, name: str, task: Any) -> None:
    """Raise TaskError for a right answer that is none of the choices: lm-eval counts such a document as wrong."""
    if (
        task.get_config("output_type") != "multiple_choice"
        or task.multiple_input
        or callable(task.config.process_results)
    ):
        return
    for number, doc in {instance.doc_id: instance.doc for instance in task.instances}.items():
        target, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        for each in target if isinstance(target, list) else [target]:
            fits = each in choices if isinstance(each, str) else each in range(len(choices))
            if not fits:
                raise TaskError(
                    f"suites.{unit.suite}.tasks: {name}: doc_to_target is {each!r} in document {number}, which has "
                    f"{len(choices)} choices; expected the text of one of them, or its number from 0"
                )


@contextmanager
def named_template(model: Any, unit: Unit) -> Iterator[None]:
    """Let `model` render prompts by the chat template that the unit names, where its tokenizer has several.

    simple_evaluate hands the name to no model: lm-eval's renders by the default one. Raises TaskError for a name that
    the tokenizer does not have, and where it has no template at all.
    """
    name, before = unit.settings.apply_chat_template, model.hf_chat_template
    known = getattr(model.tokenizer, "chat_template", None)
    by_name: dict[str, str] = known if isinstance(known, dict) else {}
    key = f"suites.{unit.suite}: {unit.task}: apply_chat_template"
    if name and not (known or before):
        raise TaskError(
            f"{key}: the model's tokenizer has no chat template; delete it, or give the model another suite"
        )
    if isinstance(name, str) and name not in by_name:
        has = f"those named {', '.join(sorted(by_name))}" if by_name else "one without a name: write true"
        raise TaskError(f"{key}: {name!r} is no chat template of the model's tokenizer, which has {has}")
    if isinstance(name, str):
        model.hf_chat_template = by_name[name]
    try:
        yield
    finally:
        model.hf_chat_template = before


def all_requests(unit: Unit, seed: Seed, model: Any) -> dict[str, list[Any]]:
    """What simple_evaluate asks of `model` for a unit: lm-eval Instances by kind, repeated ones as often as asked."""
    found: dict[str, list[Any]] = {}
    for task in built(unit, seed, model).values():
        for instance in task.instances:
            found.setdefault(instance.request_type, []).extend([instance] * (instance.repeats or 1))
    return found


class TaskError(Exception):
    """An entry of a suite that cannot be evaluated."""


class UnknownTask(TaskError):
    """lm-eval has no task, group or tag of that name."""

    def __init__(self, unit: Unit, known: list[str]) -> None:
        near = get_close_matches(unit.task, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists the names"
        where = f" or in {unit.include_path}" if unit.include_path else ""
        broken = "".join(f"\n  {line}" for line in broken_files(unit.include_path))
        super().__init__(
            f"suites.{unit.suite}.tasks: {unit.task!r} is not a task of lm-eval{where}; "
            f"expected a task, group or tag name; {hint}" + (f"\nlm-eval passed over:{broken}" if broken else "")
        )


@cache
def _task_files(include_path: str | None) -> dict[Path, Any]:
    """The content of each task file of a folder, or the error for which it cannot be read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[Path, Any] = {}
    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            found[path] = load_yaml(path, resolve_func=False)
        except Exception as error:
            found[path] = error
    return found


def _defining(include_path: str | None, name: str) -> list[Path]:
    """The task files that give this name. What cannot be read is told where a name is missing."""
    files = _task_files(include_path).items()
    return [path for path, content in files if isinstance(content, dict) and content.get("task") == name]


def broken_files(include_path: str | None) -> list[str]:
    """Task files that lm-eval passes over without a word, and why."""
    files = _task_files(include_path).items()
    return [f"{path}: {' '.join(str(error).split())}" for path, error in files if isinstance(error, Exception)]
