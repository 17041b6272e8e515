"""`reproval-vllm` as a name that lm-eval knows.

lm-eval 0.4.13 knows the models of its own table and has no entry points. Where this project is installed
(`pip install .`), Python imports this module as it starts, by the line in reproval_vllm.pth. It adds the name to the
table when lm-eval loads it, and does nothing in a program that does not. From a checkout that is not installed,

    PYTHONPATH=workflow python -m reproval.lm_eval_plugin run --model reproval-vllm ...

is lm-eval's own command with the name added.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "reproval-vllm"
CLASS = "reproval.scoring:ReprovalVLLM"
TABLE = "lm_eval.models"


def register(table: ModuleType) -> None:
    """Add the model to lm-eval's table, which imports the class when somebody asks for it."""
    from lm_eval.api.registry import model_registry

    table.MODEL_MAPPING[NAME] = CLASS
    if NAME not in model_registry:
        model_registry.register(NAME, target=CLASS)


class _Finder(MetaPathFinder):
    """Finds lm-eval's table as Python would, and registers the model once the table is loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if __name__ == "__main__":
    import lm_eval.models
    from lm_eval.__main__ import cli_evaluate

    register(lm_eval.models)
    cli_evaluate()
elif TABLE in sys.modules:
    register(sys.modules[TABLE])
else:
    sys.meta_path.insert(0, _Finder())
