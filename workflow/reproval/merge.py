"""The stage that ends an evaluation whose requests were divided over several jobs: `python -m reproval.merge`.

It runs every unit through lm-eval once more, with the answers that the shards left in place of an engine. So prompts,
metrics, groups, standard errors and samples are made by the same code from the same answers as in one job. It needs no
GPU. An answer that is missing is an error, never a guess.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reproval import keep, memory
from reproval.engine import ChildUnit, keep_unit, scored_by_lm_eval
from reproval.evaluate import EvaluateError, child_units, references
from reproval.files import RecordError, mend_of, read_record, sha256_file, write_record
from reproval.records import (
    Evaluation,
    Facts,
    ModelManifest,
    Plan,
    ScoringPath,
    ShardAnswers,
    ShardResult,
    ShardUnit,
)
from reproval.run_file import RunFile
from reproval.settings import ModelConfig
from reproval.shards import Answers, assign, read_answers, request_name
from reproval.task_facts import encoder
from reproval.tasks import TaskError

MENDS = ("max_model_len", "quantization", "dtype")
"""Score-changing settings that a user can fix for a model in config.yaml."""


class MergeError(EvaluateError):
    """The shards do not make one evaluation."""


# --- what the shards left ------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """What one shard left: its record, and the files beside it."""

    result: ShardResult
    answers: Path
    trace: Path

    @classmethod
    def read(cls, path: Path) -> Shard:
        """Raises RecordError."""
        return cls(
            read_record(path, ShardResult), path.with_suffix(".answers.jsonl.gz"), path.with_suffix(".memory.parquet")
        )


def read_shards(paths: Sequence[Path], run: str) -> list[Shard]:
    """All shards of a run, in their order. Raises MergeError and RecordError."""
    shards = sorted(map(Shard.read, paths), key=lambda shard: shard.result.shard)
    found = [(result.run, result.shard, result.shards) for result, _, _ in shards]
    if found != [(run, number, len(paths)) for number in range(1, len(paths) + 1)]:
        raise MergeError(f"expected shards 1 to {len(paths)} of {run}, found {found}; delete them and run again")
    return shards


def check_alike(shards: Sequence[ShardResult], keys: Sequence[list[str]]) -> None:
    """Raise MergeError if score-changing settings differ: `keys` are those of the units under each shard's settings."""
    if all(each == keys[0] for each in keys):
        return
    changing = (*MENDS, "kv_cache_dtype", "seed")
    values = [{name: getattr(shard.settings, name) for name in changing} for shard in shards]
    differing = [name for name in changing if len({value[name] for value in values}) > 1]
    told = "; ".join(
        f"shard {shard.shard} ran on rung {shard.rung} with " + ", ".join(f"{name} {value[name]}" for name in differing)
        for shard, value in zip(shards, values, strict=True)
    )
    last = max(shards, key=lambda shard: shard.rung).settings
    mend = [f"{name}: {getattr(last, name)}" for name in differing if name in MENDS]
    fixed = f"give the model {', '.join(mend)} in the configuration, so that every shard has it; or " if mend else ""
    raise MergeError(
        f"the shards did not run under the same settings, so their answers are not of one model: {told}. "
        f"Memory ended in some of them. Mend: {fixed}set shards: 1; or give the jobs more memory"
    )


def collect_answers(shards: Sequence[Shard]) -> Answers:
    """All answers by unit and request. Raises MergeError for a file that is not what its shard's record says."""
    found: Answers = {}
    for shard, path, _ in shards:
        mend = "Delete it and run again: what the shard had finished is kept, and only read"
        try:
            if sha256_file(path) != shard.answers_sha256:
                raise MergeError(f"{path}: SHA-256 is not {shard.answers_sha256}, as shard {shard.shard} noted. {mend}")
            for key, name, values in read_answers(path):
                found.setdefault(key, {})[name] = values
        except (OSError, EOFError, ValueError) as error:
            raise MergeError(f"{path}: cannot be read ({error}). {mend}") from error
    return found


# --- lm-eval with answers in place of an engine ----------------------------------------------------------------------


def answering(folder: str, asked: ModelConfig, max_length: int, shards: int) -> Any:
    """An lm-eval LM that has the model's tokenizer, for prompts, and whatever answers it was given by `take`.

    It raises MergeError for a request without an answer.
    """
    from lm_eval.models.utils import configure_pad_token

    base = type(encoder(folder, asked))

    class Answering(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            # lm-eval notes both in its results.
            self.tokenizer: Any = configure_pad_token(self.tokenizer)
            self.max_length = max_length

        def take(self, answers: dict[str, list[Any]]) -> None:
            self._kept = answers
            self._asked: Counter[str] = Counter()

        def _answers(self, kind: str, asked: list[Any]) -> list[Any]:
            found, missing = [], []
            for place, request in enumerate(asked):
                name = request_name(kind, request.args)
                values = self._kept.get(name, [])
                number = self._asked[name]
                self._asked[name] += 1
                if number < len(values):
                    found.append(values[number])
                else:
                    missing.append(place)
            if missing:
                places = assign(kind, [request.args for request in asked], shards)
                absent = sorted({places[place] + 1 for place in missing})
                first = asked[missing[0]]
                raise MergeError(
                    f"{len(missing)} of {len(asked)} {kind} requests have no answer, the first of task "
                    f"{first.task_name}, document {first.doc_id}; expected from shard "
                    f"{', '.join(map(str, absent))} of {shards}. The task made other requests there than here: one "
                    "that draws its prompts anew each time cannot be divided; set shards: 1"
                )
            return found

        def loglikelihood(self, asked: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(value, greedy) for value, greedy in self._answers("loglikelihood", asked)]

        def loglikelihood_rolling(self, asked: list[Any], disable_tqdm: bool = False) -> list[float]:
            return self._answers("loglikelihood_rolling", asked)

        def generate_until(self, asked: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._answers("generate_until", asked)

    return Answering()


# --- one evaluation out of several -----------------------------------------------------------------------------------


def summed(paths: Sequence[dict[str, ScoringPath]]) -> dict[str, ScoringPath]:
    """How requests were scored, over all shards, by leaf task."""
    totals: dict[str, Counter[str]] = {}
    for each in paths:
        for task, path in each.items():
            totals.setdefault(task, Counter()).update(path.model_dump())
    return {task: ScoringPath(**counts) for task, counts in totals.items()}


def merge_unit(
    entry: ChildUnit, run: RunFile, model: Any, shards: Sequence[ShardResult], answers: dict[str, list[Any]]
) -> None:
    """Keep the result of one unit, made of the shards' answers by `model` (`answering`). Raises MergeError."""
    made: list[tuple[ShardAnswers, ShardUnit]] = []
    for shard in shards:
        unit = next((u for u in shard.answered.units if u.key == entry.key), None) if shard.answered else None
        if shard.answered is None or unit is None:
            raise MergeError(
                f"shard {shard.shard} of {shard.shards} left no answers for {entry.unit.name}, whose result was kept "
                "then and is gone now; delete the run's folder `shards` and run again"
            )
        made.append((shard.answered, unit))
    model.take(answers)
    results, samples = scored_by_lm_eval(model, entry.unit, run)
    keep_unit(
        entry,
        run.run.model_name,
        results,
        samples,
        paths=summed([unit.paths for _, unit in made]),
        score_levers=shards[0].score_levers,
        begin=min(unit.begin for _, unit in made),
        duration_s=sum(unit.duration_s for _, unit in made),
        provenance=made[0][0].provenance,
        shards=[answered.provenance for answered, _ in made],
    )


def merge(
    run: RunFile, facts: Facts, plan: Plan, manifest: ModelManifest, results: Path, files: Sequence[Shard]
) -> Evaluation:
    """Keep every unit's result and describe the evaluation as one. Raises MergeError."""
    clock = time.monotonic()
    shards = [shard.result for shard in files]
    by_shard = [child_units(run, facts, shard.settings, results) for shard in shards]
    check_alike(shards, [[entry.key for entry in units] for units in by_shard])
    units = by_shard[0]
    kept = {entry.key for entry in units if keep.find(Path(entry.folder), entry.key)}
    if pending := [entry for entry in units if entry.key not in kept]:
        answers = collect_answers(files)
        model = answering(manifest.folder, run.run.model, shards[0].settings.max_model_len, len(shards))
        for entry in pending:
            print(f"[{run.run.name}] merging {entry.unit.name} of {len(shards)} shards", file=sys.stderr, flush=True)
            merge_unit(entry, run, model, shards, answers.get(entry.key, {}))
    answered = {unit.key for shard in shards if shard.answered for unit in shard.answered.units}
    attempts = [attempt for shard in shards for attempt in shard.attempts]
    return Evaluation(
        run=run.run.name,
        model=run.run.model_name,
        repeat=run.run.repeat,
        repeat_of=run.run.repeat_of,
        plan=plan,
        units=references(units, results, {entry.key for entry in units} - answered),
        attempts=attempts,
        shards=len(shards),
        begin=min(shard.begin for shard in shards),
        duration_s=sum(shard.duration_s for shard in shards) + time.monotonic() - clock,
        host_peak_bytes=max((attempt.host_peak_bytes for attempt in attempts), default=0),
        gpu_peak_bytes=max((a.gpu_peak_bytes for a in attempts if a.gpu_peak_bytes is not None), default=None),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "facts", "plan", "manifest", "results", "out", "trace"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="the shards' records")
    options = parser.parse_args()
    try:
        run = read_record(options.run, RunFile)
        shards = read_shards(options.shards, run.run.name)
        evaluation = merge(
            run,
            read_record(options.facts, Facts),
            read_record(options.plan, Plan),
            read_record(options.manifest, ModelManifest),
            options.results,
            shards,
        )
        memory.join_traces(options.trace, [(shard.trace, len(shard.result.attempts)) for shard in shards])
        write_record(options.out, evaluation)
    except (EvaluateError, RecordError, TaskError) as error:
        if isinstance(error, TaskError) and error.__cause__:
            traceback.print_exception(error.__cause__)
        sys.exit(f"reproval merge: {error}")
    except OSError as error:
        traceback.print_exc()
        sys.exit(f"reproval merge: {mend_of(error, options.results)}: what is finished is kept")


if __name__ == "__main__":
    main()
