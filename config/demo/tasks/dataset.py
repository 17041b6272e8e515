"""Loads a demo task's JSON lines from the folder beside this file, wherever the project lies."""

import json
from pathlib import Path

import datasets

DATA = Path(__file__).parent / "data"


def load(test: str, dev: str | None = None, **_metadata: object) -> datasets.DatasetDict:
    """The splits `test` and, for few-shot examples, `dev`, each from the file that `dataset_kwargs` names."""
    files = {"test": test} | ({"dev": dev} if dev else {})
    texts = {split: (DATA / file).read_text(encoding="utf-8") for split, file in files.items()}
    rows = {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(entries) for split, entries in rows.items()})
