"""What a reproduction says, as one record: results/reproduction.json is this, and the tables print it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reproval.records import Part, Record
from reproval.statistics import Scale
from reproval.verdict import Verdict


class Unlike(Part):
    """A setting that was not the same on both sides."""

    what: str
    reference: str
    here: str


class SampleComparison(Part):
    """Two sides' samples of one score, question by question."""

    documents: int = Field(description="On both sides.")
    only_reference: int
    only_here: int
    changed_prompts: int
    first_changed_prompt: str | None = Field(default=None, description="Where it begins to differ, in words.")
    changed_answers: int = Field(description="Another choice, or another text after the filter.")
    changed_scores: int
    changed: list[str] = Field(
        description="Of the first few questions with another answer: document, and both answers."
    )
    equal_bits: bool = Field(description="Every response is the same, log-probabilities to the last bit.")
    largest_log_probability_difference: float | None = Field(description="In nats; None without log-probabilities.")


class ScoreVerdict(Part):
    """What is said of one score."""

    model: str
    suite: str
    task: str
    metric: str
    filter: str
    verdict: Verdict
    reference: float | None
    here: float | None
    scale: Scale = Field(default="difference", description="`effect` is here minus reference, or here over reference.")
    effect: float | None = None
    low: float | None = Field(default=None, description="Lower end of the 95 % interval of the effect.")
    high: float | None = None
    margin: float | None = None
    n: int | None = None
    detectable: float | None = Field(default=None, description="The smallest effect that this n could have shown.")
    p_equivalence: float | None = Field(default=None, description="Not corrected; the verdict is.")
    p_difference: float | None = Field(default=None, description="Not corrected; the verdict is.")
    method: str | None = None
    notes: list[str]
    unlike: list[Unlike] = Field(description="The most telling first.")
    samples: SampleComparison | None = None


class Reproduction(Record):
    """The verdicts of one run."""

    kind: Literal["reproduction"] = "reproduction"
    title: str
    source: str
    verdict: Verdict = Field(description="Of the whole: the worst of its scores.")
    exit_code: int
    alpha: float
    margin_because: str
    scores: list[ScoreVerdict]
