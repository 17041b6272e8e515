"""The stage `facts`: what a plan needs to know of one model and its tasks, without an engine or a GPU."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

from reproval.counted import Counted
from reproval.files import read_record, write_record
from reproval.model_check import check, known_tokens
from reproval.model_facts import facts_of, read_config
from reproval.model_tensors import ModelError, read_tensors
from reproval.records import Facts, ModelManifest, TaskFacts
from reproval.run_file import RunFile
from reproval.store import message, of_manifest
from reproval.task_facts import counted_with, encoder, unit_facts
from reproval.tasks import TaskError


def make_facts(run: RunFile, manifest: ModelManifest, results: Path) -> Facts:
    """Read the model's headers and tokenize every request of its units, from the store alone.

    What a tokenizer has counted is kept in RESULTS/work/facts. Raises ModelError, tasks.TaskError, OSError.
    """
    folder = Path(manifest.folder)
    config, tensors = read_config(folder), read_tensors(folder)
    found = facts_of(config, tensors)  # First: its message is for values that the check would stumble over too.
    check(config, tensors, f"{folder}/config.json")
    trusted = run.run.model.trust_remote_code
    _refuse_unknown(folder, config.get("model_type"), trusted)
    try:
        model = encoder(manifest.folder, run.run.model)
        tokenizer = model.tokenizer
    except Exception as error:
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded: {type(error).__name__}: {error}; expected the files that "
            "tokenizer.save_pretrained(FOLDER) writes; copy them again"
        ) from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}/tokenizer_config.json: names neither bos_token nor eos_token, or is not there; expected one of "
            "them, by which an empty context is asked; copy the file from where the weights come from"
        )
    counted = Counted(results / "work/facts", counted_with(manifest, model, trusted, run.environment))
    tasks: list[TaskFacts] = []
    for unit in run.run.units:
        tasks += unit_facts(unit, run.seed, model, counted)
    _refuse_thoughts(run, tasks)
    known = known_tokens(tensors, found.vocab_size)
    for task in tasks:
        # vLLM pads the embedding with zeros, and takes some of such tokens without a word.
        if task.largest_token >= known:
            raise ModelError(
                f"{folder}: its tokenizer makes token {task.largest_token} of task {task.task}, and the model has an "
                f"embedding for tokens 0 to {known - 1}; expected the tokenizer that it was trained with, or an "
                "embedding that was resized with it (model.resize_token_embeddings)"
            )
    return Facts(
        run=run.run.name,
        model=run.run.model_name,
        model_digest=manifest.digest,
        model_facts=found,
        tasks=tasks,
    )


def _refuse_thoughts(run: RunFile, tasks: list[TaskFacts]) -> None:
    """Raise ModelError for a model that is to think over tasks that read log-probabilities: lm-eval refuses them."""
    scored = sorted({task.task for task in tasks if task.request_type == "loglikelihood"})
    if run.run.model.enable_thinking and scored:
        are = f" and {len(scored) - 1} more are" if len(scored) > 1 else " is"
        raise ModelError(
            f"enable_thinking: true, and {scored[0]}{are} scored by log-probabilities; expected tasks that generate "
            "text; give this model suites of such tasks, or a second entry without enable_thinking for the others"
        )


def _refuse_unknown(folder: Path, model_type: Any, trusted: bool) -> None:
    """Raise ModelError for a type of model whose configuration neither transformers nor vLLM can read."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        return
    from vllm.transformers_utils.config import get_config  # takes seconds; has types of its own

    try:
        get_config(str(folder), trust_remote_code=trusted)
    except Exception as error:
        mend = "" if trusted else "; write trust_remote_code: true if it brings code that you trust"
        raise ModelError(
            f"{folder}/config.json: model_type is {model_type!r}; expected one that vLLM or transformers knows{mend}"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, nargs="+", required=True, help="Manifests of the suites.")
    parser.add_argument("--results", type=Path, required=True, help="Where counts are kept for other models.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    run = read_record(options.run, RunFile)
    # Else transformers and datasets look for what is missing on the Hub, and say only that they are offline.
    if wrong := [line for path in (options.manifest, *options.tasks) for line in of_manifest(path, Path(run.store))]:
        sys.exit(f"reproval facts: {message(wrong)}")
    try:
        facts = make_facts(run, read_record(options.manifest, ModelManifest), options.results)
    except ModelError as error:
        sys.exit(f"reproval facts: models.{run.run.model_name}: {error}")
    except TaskError as error:
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        sys.exit(f"reproval facts: {error}")
    write_record(options.out, facts)


if __name__ == "__main__":
    main()
