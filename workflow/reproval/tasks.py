"""lm-eval's tasks with the settings of a unit, for the stages that look at them without a model.

`simple_evaluate` applies a caller's settings to the tasks that it loads, and offers no way to do only that.
`prepare` makes the same changes in the same order (lm_eval/evaluator.py, lm-eval 0.4.13); a test holds the requests
that come out of both together.
"""

from __future__ import annotations

import random
from functools import cache, lru_cache
from typing import Any

from reproval.seeds import Seed, seeds
from reproval.settings import TaskSettings, Unit


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


def prepare(unit: Unit, seed: Seed) -> dict[str, Any]:
    """Load a unit's leaf tasks and apply its settings. Returns lm-eval Task objects by name.

    Raises UnknownTask for a name that lm-eval does not know. Loading reads the data sets: from the network in `stage`,
    from the store afterwards.
    """
    tasks = manager(unit.include_path)
    if not tasks.match_tasks([unit.task]):
        raise UnknownTask(unit, list(tasks.all_tasks))
    loaded: dict[str, Any] = tasks.load([unit.task])["tasks"]
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


def built(unit: Unit, seed: Seed, model: Any) -> dict[str, Any]:
    """A unit's leaf tasks with their requests, as simple_evaluate builds them for `model`. Raises UnknownTask."""
    import numpy as np
    from lm_eval.evaluator_utils import get_sample_size

    # Loading a task and building a prompt may draw numbers (shuffled choices): start where simple_evaluate starts.
    asked = seeds(seed)
    random.seed(asked["random_seed"])
    np.random.seed(asked["numpy_random_seed"])
    chat = chat_arguments(unit.settings)
    tasks = prepare(unit, seed)
    for task in tasks.values():
        task.build_all_requests(
            limit=get_sample_size(task, unit.settings.limit),
            rank=0,
            world_size=1,
            chat_template=model.apply_chat_template if chat["apply_chat_template"] else None,
            tokenizer_name=model.tokenizer_name if chat["apply_chat_template"] else "",
            **{**chat, "apply_chat_template": bool(chat["apply_chat_template"])},
        )
    return tasks


def all_requests(unit: Unit, seed: Seed, model: Any) -> dict[str, list[Any]]:
    """What simple_evaluate asks of `model` for a unit: lm-eval Instances by kind, repeated ones as often as asked."""
    found: dict[str, list[Any]] = {}
    for task in built(unit, seed, model).values():
        for instance in task.instances:
            found.setdefault(instance.request_type, []).extend([instance] * (instance.repeats or 1))
    return found


class UnknownTask(Exception):
    """lm-eval has no task, group or tag of that name."""

    def __init__(self, unit: Unit, known: list[str]) -> None:
        from difflib import get_close_matches

        near = get_close_matches(unit.task, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists the names"
        where = f" or in {unit.include_path}" if unit.include_path else ""
        super().__init__(
            f"suites.{unit.suite}.tasks: {unit.task!r} is not a task of lm-eval{where}; "
            f"expected a task, group or tag name; {hint}"
        )
