"""lm-eval's tasks with the settings of a unit, for the stages that look at them without a model.

`simple_evaluate` applies a caller's settings to the tasks that it loads, and offers no way to do only that.
`prepare` makes the same changes in the same order (lm_eval/evaluator.py, lm-eval 0.4.13); a test holds the requests
that come out of both together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from reproval.settings import TaskSettings, Unit

# What lm-eval takes when no seed is given (lm_eval/defaults.py): Python's generator, then NumPy, PyTorch, few-shot.
LM_EVAL_SEEDS = (0, 1234, 1234, 1234)


def seeds(seed: int | None) -> dict[str, int]:
    """The four seeds of simple_evaluate, by the names of its arguments: lm-eval's own, or one for all."""
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return dict(zip(names, LM_EVAL_SEEDS if seed is None else (seed,) * 4, strict=True))


@cache
def manager(include_path: str | None) -> Any:
    """A TaskManager that knows lm-eval's tasks and those of a folder; its index takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def chat_arguments(settings: TaskSettings) -> dict[str, Any]:
    """The chat arguments of simple_evaluate; what the user left open has lm-eval's default."""
    return {
        "system_instruction": settings.system_instruction,
        "apply_chat_template": settings.apply_chat_template or False,
        "fewshot_as_multiturn": settings.fewshot_as_multiturn if settings.fewshot_as_multiturn is not None else True,
    }


def prepare(unit: Unit, seed: int | None) -> dict[str, Any]:
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
