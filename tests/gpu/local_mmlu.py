"""MMLU as lm-eval has it, from local files, for machines without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

GROUP = "local_mmlu"
PROMPT = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"


def write(folder: Path, mmlu: Path) -> None:
    """Write task files into `folder`, one for each subject, with a copy of `mmlu`/{dev,test}/SUBJECT.jsonl."""
    data = shutil.copytree(mmlu, folder / "data")
    names = []
    for path in sorted((data / "test").glob("*.jsonl")):
        names.append(f"local_{path.stem}")
        task = {
            "task": names[-1],
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path), "dev": str(data / "dev" / path.name)}},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "description": "The following are multiple choice questions (with answers) about "
            f"{path.stem.replace('_', ' ')}.\n\n",
            "doc_to_text": PROMPT,
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{names[-1]}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    group = {
        "group": GROUP,
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "_group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
