"""config/tiers.yaml: size tiers, and policies that say what a plan may do to a model of each tier.

The models below are the one definition of every key; `workflow/schemas/tiers.schema.yaml` is generated from them by
`python -m reproval.tiers`.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from reproval.records import Dtype, NeutralLever, ScoreLever
from reproval.settings import Name, Section


class TiersError(Exception):
    """tiers.yaml cannot be used; the message names the file, the key, and the mend."""


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
            raise ValueError("the last tier must have no below_billions, so that every model has a tier")
        finite = [bound for bound in bounds[:-1] if bound is not None]
        if len(finite) != len(bounds) - 1 or finite != sorted(set(finite)):
            raise ValueError("every tier but the last needs below_billions, each larger than the one before")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"two tiers have the same name: {names}")
        for policy, rule in self.policies.items():
            for name in rule.tiers:
                if name not in names:
                    raise ValueError(f"policies.{policy}.tiers.{name}: no such tier{nearest(name, names)}")
        return self

    def tier_of(self, parameters: int) -> Tier:
        """The first tier whose bound lies above the count."""
        return next(
            tier for tier in self.tiers if tier.below_billions is None or parameters < tier.below_billions * 1e9
        )

    def policy(self, name: str) -> Policy:
        """Raises TiersError for a name that the file lacks."""
        if name not in self.policies:
            raise TiersError(f"policy: {name!r} is not in the tiers file{nearest(name, list(self.policies))}")
        return self.policies[name]


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean X?', or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(known))}"


def load_tiers(path: Path) -> Tiers:
    """Read tiers.yaml. Raises TiersError, which names the file, the key, what was found and the mend."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TiersError(f"{path}: cannot be read: {error}") from error
    try:
        return Tiers.model_validate(content)
    except ValidationError as error:
        raise TiersError("\n".join(f"{path}: {line}" for line in _explain(error))) from error


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{nearest(str(problem['loc'][-1]), _keys())}")
        else:
            lines.append(f"{key or '(the whole file)'}: {problem['msg']}; found {problem['input']!r:.80}")
    return lines


def _keys() -> list[str]:
    return [key for part in (Tiers, Tier, Policy, TierRule, Start) for key in part.model_fields]


def schema() -> dict[str, Any]:
    """JSON Schema of tiers.yaml, for editors and readers."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Tiers.model_json_schema()}


if __name__ == "__main__":
    yaml.safe_dump(schema(), sys.stdout, sort_keys=False, allow_unicode=True, width=120)
