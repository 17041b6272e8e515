"""config/tiers.yaml: size tiers, and policies that say what a plan may do to a model of each tier.

The models below are the one definition of every key; `workflow/schemas/tiers.schema.yaml` is generated from them by
`python -m reproval.tiers`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from reproval import strictyaml
from reproval.problems import ConfigError, Problem, dotted, listing, nearest, show
from reproval.records import Dtype, NeutralLever, ScoreLever
from reproval.settings import Name, Section


class Tier(Section):
    """Models of one size, by parameters counted in the checkpoint."""

    name: Name
    below_billions: float | None = Field(
        default=None,
        gt=0,
        description="Models with fewer than this many billion (1e9) parameters; a model with exactly so many belongs "
        "to the next tier. The last tier has none.",
    )


class Start(Section):
    """Engine settings that a policy begins with, needed or not. What is left out, the plan chooses."""

    enforce_eager: bool | None = Field(default=None, description="Run without CUDA graphs.")
    gpu_memory_utilization: float | list[float] | None = Field(
        default=None,
        description="vLLM's share of GPU memory; of a list, the first that is predicted to fit. Left out, the plan "
        "gives the KV cache in bytes.",
    )
    max_num_batched_tokens: int | None = Field(default=None, gt=0, description="Tokens of one engine step.")
    max_num_seqs: int | None = Field(default=None, gt=0, description="Requests that run at once.")
    max_model_len: int | None = Field(default=None, ge=16, description="Length cap in tokens. Changes scores.")
    quantization: str | None = Field(default=None, pattern="^(fp8|bitsandbytes)$", description="Changes scores.")
    kv_cache_dtype: str | None = Field(default=None, description="Such as fp8. Changes scores.")
    dtype: Dtype | None = Field(default=None, description="Changes scores.")


class TierRule(Section):
    """What a policy does to models of one tier."""

    start: Start = Field(default=Start(), description=Start.__doc__)
    score_levers: list[ScoreLever] = Field(
        default=[], description="Score-changing levers that the plan may pull, in this order, when nothing else fits."
    )
    quantizations: list[str] = Field(
        default=["fp8", "bitsandbytes"],
        description="Methods to try, in this order, where `quantization` is a lever. fp8 needs compute capability 8.9.",
    )
    shortest_max_model_len: int = Field(
        default=1024, ge=16, description="The plan cuts no further than to this where `max_model_len` is a lever."
    )


class Policy(Section):
    """How a plan is made."""

    summary: str = Field(description="One sentence for the report.")
    neutral_levers: list[NeutralLever] = Field(
        default=[], description="Levers that change rounding at most, which the plan may pull when it needs memory."
    )
    free_share: float = Field(
        default=0.05,
        ge=0,
        lt=0.5,
        description="Share of memory left unplanned, for fragmentation and for what the prediction misses.",
    )
    start: Start = Field(default=Start(), description="Settings to begin with in every tier; a tier's own win.")
    tiers: dict[Name, TierRule] = Field(default={}, description="By the name of a tier; one left out has no rule.")

    def start_of(self, tier: str) -> Start:
        """The policy's start with the tier's own settings put over it."""
        own = self.tiers.get(tier, TierRule()).start
        return self.start.model_copy(update=own.model_dump(exclude_none=True))


class Tiers(Section):
    """The whole of tiers.yaml."""

    tiers: list[Tier] = Field(min_length=1, description="From the smallest to the largest.")
    policies: dict[Name, Policy] = Field(min_length=1, description="Policies by a name of your choice.")

    @model_validator(mode="after")
    def _consistent(self) -> Tiers:
        bounds = [tier.below_billions for tier in self.tiers]
        if bounds[-1] is not None:
            raise ValueError("a last tier without below_billions, so that every model has a tier")
        finite = [bound for bound in bounds[:-1] if bound is not None]
        if len(finite) != len(bounds) - 1 or finite != sorted(set(finite)):
            raise ValueError("every tier but the last with below_billions, each larger than the one before")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"tiers with different names, not {listing(names)}")
        for policy, rule in self.policies.items():
            for name in rule.tiers:
                if name not in names:
                    raise ValueError(f"policies.{policy}.tiers with the names of tiers ({listing(names)}), not {name}")
        return self

    def tier_of(self, parameters: int) -> Tier:
        """The first tier whose bound lies above the count."""
        return next(
            tier for tier in self.tiers if tier.below_billions is None or parameters < tier.below_billions * 1e9
        )

    def policy(self, name: str) -> Policy:
        """Raises ConfigError for a name that the file lacks."""
        if name not in self.policies:
            close = nearest(name, self.policies)
            raise ConfigError(
                [
                    Problem(
                        place="",
                        key="policy",
                        found=show(name),
                        expected=f"one of the policies of the tiers file: {listing(sorted(self.policies))}",
                        mend=f"did you mean {close}?" if close else "choose one of them, or add it to the tiers file",
                    )
                ]
            )
        return self.policies[name]


def load_tiers(path: Path) -> Tiers:
    """Read tiers.yaml. Raises ConfigError with every problem: file and line, key, found, expected and the mend."""
    try:
        document = strictyaml.read(path)
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError([Problem(str(path), "", found, "a readable file", "correct `tiers`")]) from error
    except strictyaml.YamlError as error:
        place = f"{path}:{error.line}" if error.line else str(path)
        raise ConfigError([Problem(place, "", error.found, "YAML", error.mend)]) from error
    problems = [
        Problem(
            f"{path}:{twice.lines[1]}",
            dotted(twice.path),
            f"the key a second time (first in line {twice.lines[0]})",
            "every key once",
            "delete one of the two",
        )
        for twice in document.duplicates
    ]
    try:
        tiers = Tiers.model_validate(document.data)
    except ValidationError as error:
        problems += [_problem(path, document, dict(each)) for each in error.errors()]
        raise ConfigError(problems) from error
    if problems:
        raise ConfigError(problems)
    return tiers


def _problem(path: Path, document: strictyaml.Document, violation: dict[str, Any]) -> Problem:
    key = tuple(violation["loc"])
    known = key
    while known and known not in document.marks:
        known = known[:-1]
    place = f"{path}:{document.marks[known].line}" if known else str(path)
    if violation["type"] == "extra_forbidden":
        keys = list(_section(key[:-1]).model_fields)
        close = nearest(str(key[-1]), keys)
        mend = f"did you mean {close}?" if close else "delete it"
        return Problem(place, dotted(key), "an unknown key", f"one of {listing(keys)}", mend)
    if violation["type"] == "value_error":
        expected = str(violation["ctx"]["error"])
        return Problem(place, dotted(known), "tiers and policies that do not agree", expected, "correct one of them")
    return Problem(place, dotted(known), show(violation["input"]), violation["msg"], "correct the value")


def _section(path: tuple[Any, ...]) -> type[BaseModel]:
    """The model that describes the mapping at a path of tiers.yaml."""
    if not path:
        return Tiers
    if path[0] == "tiers":
        return Tier
    if path[-1] == "start":
        return Start
    return TierRule if "tiers" in path[2:] else Policy


def schema() -> dict[str, Any]:
    """JSON Schema of tiers.yaml, for editors and readers."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Tiers.model_json_schema()}


if __name__ == "__main__":
    yaml.safe_dump(schema(), sys.stdout, sort_keys=False, allow_unicode=True, width=120)
