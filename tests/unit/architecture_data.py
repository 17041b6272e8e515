"""The checkpoints of architectures/*.json, as configuration and tensors: what a folder on disk has."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from reproval.model_facts import facts_of
from reproval.model_tensors import Tensor
from reproval.records import ModelFacts

FOLDER = Path(__file__).parent / "architectures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


@cache
def facts(name: str) -> ModelFacts:
    return facts_of(load(name)["config"], tensors(name))


def tensors(name: str) -> list[Tensor]:
    """A pattern stands for many tensors: {4} for 0 to 3, {2-4} for 2 to 4, {1,5} for these."""
    content = load(name)
    listed = []
    for pattern, shape in content["tensors"].items():
        dtype, size = (shape[0], shape[1:]) if isinstance(shape[0], str) else (content["stored_dtype"], shape)
        listed += [Tensor(full, dtype, tuple(size)) for full in expand(pattern)]
    return listed


def expand(pattern: str) -> list[str]:
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(text: str) -> list[str]:
    if "," in text:
        return text.split(",")
    first, _, last = text.rpartition("-")
    return [str(number) for number in (range(int(first), int(last) + 1) if first else range(int(last)))]
