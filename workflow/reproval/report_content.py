"""What a report says, as one record: report.json is this, and the HTML and Markdown print it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reproval.records import (
    Attempt,
    MemoryPrediction,
    Part,
    PhasePeak,
    PulledLever,
    Reason,
    Record,
    ScoringPath,
    TimeEstimate,
)
from reproval.statistics import Scale


class Cell(Part):
    """One model's headline score of one task."""

    model: str
    value: float
    low: float | None
    high: float | None
    method: str | None
    stderr: float | None
    n: int | None
    score_levers: list[str]
    prompts_cut: int
    repeats: int = 1
    repeat_sd: float | None = Field(default=None, description="Standard deviation over repeats: the noise floor.")


class Headline(Part):
    """One task, by the metric that stands for it, for every model in the order of `Report.models`."""

    suite: str
    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    group: bool
    subtasks: int
    n_shot: int | None
    limit: float | None = Field(default=None, description="First N documents of each task, or below 1 a fraction.")
    cells: list[Cell | None]


class Pair(Part):
    """Two models on the same questions of one task. `effect` is a minus b, or a over b where `scale` is ratio."""

    suite: str
    task: str
    metric: str
    filter: str
    a: str
    b: str
    n: int
    effect: float
    low: float | None
    high: float | None
    scale: Scale
    p_value: float
    p_holm: float
    significant: bool
    better: str | None = Field(description="Which of the two is significantly better; None where neither is.")
    detectable: float | None
    method: str
    prompts_equal: bool
    score_levers: list[str] = Field(description="MODEL: LEVER for every score-changing lever behind either score.")


class Untested(Part):
    suite: str
    task: str
    a: str
    b: str
    reason: str


class Fit(Part):
    """What was done to a model to make it fit."""

    model: str
    parameters: int
    tier: str
    policy: str
    hardware: str
    fits: bool
    advice: str | None
    rung: int = Field(description="The rung of the ladder that finished; 0 is the plan itself.")
    rungs: int
    levers: list[PulledLever]
    changes_scores: bool
    settings: dict[str, Any]
    reasons: list[Reason]


class Curve(Part):
    """Memory over time of the attempt that finished (or the last), thinned so that every peak stays."""

    attempt: int
    t_s: list[float]
    series: dict[str, list[int]] = Field(description="`host`, `gpu0`, ... in bytes.")


class Memory(Part):
    model: str
    device: str = Field(description="`GPU` or `host`: where the plan's peak is.")
    jobs_per_gpu: int = Field(default=1, description="Above 1 the measured peak is that of all jobs on the GPU.")
    predicted_bytes: int | None
    measured_bytes: int | None
    capacity_bytes: int
    host_predicted_bytes: int | None
    host_measured_bytes: int
    prediction: MemoryPrediction | None
    phases: list[PhasePeak]
    curve: Curve | None


class TaskTime(Part):
    suite: str
    task: str
    duration_s: float
    reused: bool
    paths: ScoringPath = Field(description="Summed over leaf tasks.")
    requests_per_s: float | None = Field(description="Of those that were not kept earlier; None if all were.")
    tokens_per_s: float | None = Field(description="None if a request was kept earlier.")


class Timing(Part):
    model: str
    begin: str
    duration_s: float
    shards: int = Field(default=1, description="Jobs whose times are summed in `duration_s` and of the tasks.")
    startup_s: float | None = Field(description="From the start of the finished attempt to its first task.")
    predicted: TimeEstimate | None
    tasks: list[TaskTime]


class AttemptRow(Part):
    model: str
    number: int
    attempt: Attempt


class Cut(Part):
    model: str
    suite: str
    task: str
    cut: int
    ended_by_length: int
    requests: int
    max_model_len: int | None
    longest_request_tokens: int | None


class TaskProvenance(Part):
    suite: str
    task: str
    version: str | None
    n_shot: int | None
    dataset: str | None
    settings: dict[str, str] = Field(
        default={}, description="What the configuration set for lm-eval; the rest is the task's own."
    )
    hashes: dict[str, str] = Field(description="Prompt hash -> the models that have it.")


class ReportProvenance(Part):
    common: dict[str, str] = Field(description="What is the same for every result.")
    by_model: dict[str, dict[str, str]]
    engine_arguments: dict[str, dict[str, str]] = Field(
        description="As the engine had them: argument -> model -> value."
    )
    tasks: list[TaskProvenance]
    files: dict[str, dict[str, str]] = Field(description="Model -> file -> SHA-256.")


class ScoreTable(Part):
    columns: list[str]
    rows: list[list[Any]]


class Notice(Part):
    """What a reader has to know before using a number, in a sentence, and the section that says more."""

    text: str
    section: Literal["fit", "cuts", "provenance"]


class Report(Record):
    kind: str = "report"
    title: str
    answer: str
    notices: list[Notice]
    findings: list[str]
    models: list[str]
    headlines: list[Headline]
    comparisons: list[Pair]
    untested: list[Untested]
    fits: list[Fit]
    memory: list[Memory]
    timing: list[Timing] = Field(description="Of every run; a repeat's `model` is MODEL, repeat K.")
    attempts: list[AttemptRow]
    cuts: list[Cut]
    provenance: ReportProvenance
    commands: list[str]
    methods: dict[str, dict[str, str]] = Field(description="Those that this report uses.")
    scores: ScoreTable
    removed: int = Field(description="Paths and secrets that were taken out of this report.")
