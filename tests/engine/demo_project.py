"""One run of the demo's model on small tasks, as records: what the stages before `evaluate` make of a configuration."""

from __future__ import annotations

import gc
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from reproval import keep
from reproval.engine import ChildUnit
from reproval.evaluate import child_units
from reproval.files import write_record
from reproval.model_facts import facts_of, read_config
from reproval.model_tensors import read_tensors
from reproval.records import EngineSettings, Facts, Hardware, MemoryPrediction, ModelManifest, Plan, Rung, UnitResult
from reproval.request_cache import RequestCache
from reproval.run_file import RunFile
from reproval.settings import ModelConfig, Run, TaskSettings, Unit
from reproval.task_facts import encoder, unit_facts

if TYPE_CHECKING:
    from reproval.scoring import ReprovalVLLM

BASE = Path(__file__).resolve().parents[2]
MODEL = BASE / "resources/demo/SmolLM2-135M-Instruct"
TASKS = BASE / "config/demo/tasks"
DEMO = ("demo_opposites", "demo_endings", "demo_counting", "demo_prose")
NAME = "m-000000000000"
SETTINGS = EngineSettings(
    dtype="float32",
    max_model_len=256,
    max_num_batched_tokens=1024,
    max_num_seqs=16,
    kv_cache_memory_bytes=2**28,
    enforce_eager=True,
    submit_batch=16,
)


@contextmanager
def started(model: Path = MODEL, **more: Any) -> Iterator[ReprovalVLLM]:
    """An engine with the demo's model, or another, and SETTINGS, in this process; what it holds is given back."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    if not (MODEL / "config.json").exists():
        pytest.skip("needs the demo's model: make model")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TORCH_COMPILE_DISABLE"):
            patch.setenv(name, "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm.distributed import cleanup_dist_env_and_memory

        from reproval.engine import settings_arguments
        from reproval.scoring import ReprovalVLLM

        lm = ReprovalVLLM(str(model), **({"submit_batch": SETTINGS.submit_batch} | settings_arguments(SETTINGS) | more))
        yield lm
        del lm.model
        gc.collect()
        cleanup_dist_env_and_memory()


def own_tasks(folder: Path) -> None:
    """A group of two tasks, unconditional requests too, and answers that are drawn three times each."""
    (folder / "data").mkdir()
    rows = [{"q": f"{n} plus {n % 3} is", "c": [str(n + n % 3), "a cow", "many"], "a": n % 3} for n in range(12)]
    (folder / "data/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data/sums.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{q}}",
        "metadata": {"version": 1.0},
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{c}}", "doc_to_target": "a"}
    metrics = [{"metric": name} for name in ("acc", "acc_norm", "acc_mutual_info")]
    files: dict[str, dict[str, Any]] = {
        "sums_choice": common | choice | {"metric_list": metrics},
        "sums_asked": common | choice | {"doc_to_text": "Question: {{q}}\nAnswer:", "metric_list": metrics[:1]},
        "sums": {
            "group": "sums",
            "task": ["sums_choice", "sums_asked"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
            "metadata": {"version": 1.0},
        },
        "sums_drawn": common
        | {
            "output_type": "generate_until",
            "doc_to_target": "{{c[0]}}",
            "repeats": 3,
            "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": True, "temperature": 0.9},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, content in files.items():
        named = content if "group" in content else {"task": name} | content
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(named, sort_keys=False))


class Project:
    """The records of one run on demo tasks and, from the folder `own`, others; `limit` documents of each."""

    def __init__(self, demo: tuple[str, ...] = DEMO, own: Path | None = None, limit: int = 8) -> None:
        entries = [(name, TASKS) for name in demo] + [(name, own) for name in ("sums", "sums_drawn") if own]
        units = [
            Unit(
                suite="s",
                task=name,
                include_path=str(folder),
                unsafe_code=False,
                settings=TaskSettings(limit=limit),
            )
            for name, folder in entries
        ]
        run = Run(name=NAME, model_name="m", model=ModelConfig(path=str(MODEL)), units=units, identity={})
        self.run = RunFile(
            run=run,
            hardware=Hardware(gpus=0, host_memory_bytes=2**33, cpus=2),
            policy="auto",
            seed=None,
            batch_invariant=False,
            container=None,
            environment="cpu.txt sha256:00",
            store="resources",
        )
        tokenizer = encoder(str(MODEL), ModelConfig())
        counted = [entry for unit in units for entry in unit_facts(unit, None, tokenizer)]
        model = facts_of(read_config(MODEL), read_tensors(MODEL))
        self.facts = Facts(run=NAME, model="m", model_digest="1" * 64, model_facts=model, tasks=counted)
        self.manifest = ModelManifest(model="m", source="local", folder=str(MODEL), files=[], digest="1" * 64)
        nothing = dict.fromkeys(MemoryPrediction.model_fields, 0)
        self.plan = Plan(
            run=NAME,
            model="m",
            hardware=self.run.hardware,
            policy="auto",
            tier="t",
            parameters=1,
            fits=True,
            levers=[],
            reasons=[],
            ladder=[Rung(settings=SETTINGS, levers=[], predicted=MemoryPrediction(**nothing))],
        )

    def units(self, results: Path) -> list[ChildUnit]:
        return child_units(self.run, self.facts, SETTINGS, results)

    def results(self, folder: Path) -> dict[str, UnitResult]:
        """By task; all of them are kept, or this fails."""
        found = {}
        for entry in self.units(folder):
            result = keep.find(Path(entry.folder), entry.key)
            assert result is not None, entry.unit.name
            found[entry.unit.task] = result
        return found


class Job:
    """What a batch system starts, and starts again: `python -m reproval.evaluate` in a working directory."""

    def __init__(self, folder: Path, project: Project) -> None:
        self.folder = folder
        for name, record in {
            "run": project.run,
            "facts": project.facts,
            "plan": project.plan,
            "manifest": project.manifest,
        }.items():
            write_record(folder / f"{name}.json", record)

    def start(self, **variables: str) -> subprocess.Popen[bytes]:
        inputs = [part for name in ("run", "facts", "plan", "manifest") for part in (f"--{name}", f"{name}.json")]
        outputs = ["--results", "results", "--log", "log", "--out", "evaluation.json", "--trace", "memory.parquet"]
        with (self.folder / "job.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "reproval.evaluate", *inputs, *outputs, "--gpus", "0"],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(BASE / "workflow"), **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> list[bytes]:
        """Digests of all requests that are on disk, as often as they were answered."""
        found = []
        for path in self.folder.glob("results/requests/*.jsonl"):
            for line in path.read_bytes().splitlines(keepends=True)[1:]:
                if (parsed := RequestCache._parse(line)) is not None:
                    found.append(parsed[0])
        return found

    def samples(self, project: Project) -> dict[str, list[Any]]:
        found = {}
        for entry in project.units(Path("results")):
            with gzip.open(self.folder / entry.folder / keep.SAMPLES) as stream:
                found[entry.unit.task] = [json.loads(line) for line in stream]
        return found
