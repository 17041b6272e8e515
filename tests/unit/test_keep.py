"""A kept result is found again if it is whole and of the same making, and under no other circumstance."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path
from typing import Any

import pytest
from examples import UNIT, engine_settings, model_facts, provenance_record, run_file, task_facts

from reproval import keep
from reproval.files import sha256_file, sha256_json, write_record
from reproval.records import Facts, Hardware, UnitResult
from reproval.settings import ModelConfig, TaskSettings


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "run": "m-000000000000",
        "model": "m",
        "model_digest": "1" * 64,
        "model_facts": model_facts(),
        "tasks": [task_facts(suite="core", unit="arc", task="arc")],
    }
    return Facts(**(fields | changes))


def write_result(folder: Path, made_of: dict[str, Any]) -> str:
    key = sha256_json(made_of)
    with keep.new_folder(folder) as part:
        (part / keep.SAMPLES).write_bytes(gzip.compress(b"{}\n", mtime=0))
        result = UnitResult(
            key=key,
            made_of=made_of,
            model="m",
            suite="core",
            task="arc",
            scores=[],
            versions={},
            n_shot={},
            paths={},
            group_subtasks={},
            task_hashes={},
            score_levers=[],
            begin="2026-01-01T00:00:00+00:00",
            duration_s=1.0,
            provenance=provenance_record(),
            samples_sha256=sha256_file(part / keep.SAMPLES),
            lm_eval={},
        )
        write_record(part / keep.RESULT, result)
    return key


def test_what_decides_scores_is_in_the_key_and_what_does_not_is_not() -> None:
    base = keep.made_of(UNIT, run_file(), facts(), engine_settings())
    zero_shot = UNIT.model_copy(update={"settings": TaskSettings(num_fewshot=0)})
    other_files = UNIT.model_copy(update={"include_sha256": "2" * 64})
    on_gpu = Hardware(gpus=1, gpu_memory_bytes=80 * 2**30, host_memory_bytes=2**33, cpus=2)
    own_code = run_file().run.model_copy(update={"model": ModelConfig(path="m", trust_remote_code=True)})
    thinking = [
        run_file().run.model_copy(update={"model": ModelConfig(**({"path": "m"} | told))})
        for told in (
            {"enable_thinking": False},
            {"think_end_token": "</think>"},
            {"chat_template_args": {"reasoning_effort": "high"}},
        )
    ]
    other_prompts = facts(tasks=[task_facts(suite="core", unit="arc", task="arc", task_hash="2" * 64)])
    different = [
        keep.made_of(UNIT, run_file(), facts(model_digest="2" * 64), engine_settings()),
        keep.made_of(UNIT, run_file(), other_prompts, engine_settings()),
        keep.made_of(UNIT, run_file(seed=1), facts(), engine_settings()),
        keep.made_of(UNIT, run_file(environment="gpu.txt sha256:11"), facts(), engine_settings()),
        keep.made_of(UNIT, run_file(batch_invariant=True), facts(), engine_settings()),
        keep.made_of(UNIT, run_file(), facts(), engine_settings(dtype="float16")),
        keep.made_of(UNIT, run_file(), facts(), engine_settings(quantization="fp8")),
        keep.made_of(UNIT, run_file(), facts(), engine_settings(kv_cache_dtype="fp8")),
        keep.made_of(UNIT, run_file(), facts(), engine_settings(max_model_len=128)),
        keep.made_of(zero_shot, run_file(), facts(), engine_settings()),
        keep.made_of(other_files, run_file(), facts(), engine_settings()),
        keep.made_of(UNIT, run_file(hardware=on_gpu), facts(), engine_settings()),
        keep.made_of(UNIT, run_file(run=own_code), facts(), engine_settings()),
        *(keep.made_of(UNIT, run_file(run=thoughts), facts(), engine_settings()) for thoughts in thinking),
        keep.made_of(UNIT, run_file(), facts(), engine_settings(seed=1)),
        *(
            keep.made_of(
                UNIT.model_copy(update={name: "other"}),
                run_file(),
                facts(tasks=[task_facts(**{"suite": "core", "unit": "arc"} | {place: "other"})]),
                engine_settings(),
            )
            for name, place in (("suite", "suite"), ("task", "unit"))
        ),
    ]
    keys = {sha256_json(made) for made in [base, *different]}
    assert len(keys) == len(different) + 1
    neutral = engine_settings(max_num_batched_tokens=64, max_num_seqs=1, enforce_eager=False, submit_batch=7)
    assert keep.made_of(UNIT, run_file(policy="published"), facts(), neutral) == base


def test_what_other_units_ask_has_no_part_in_a_unit_s_key() -> None:
    """A configuration that grew by a task, or a suite with the same task under another setting, finds what is done."""
    own = task_facts(suite="core", unit="arc", task="arc")
    grown = facts(tasks=[own, task_facts(suite="core", unit="new", task="new"), task_facts(suite="more", unit="arc")])
    assert keep.made_of(UNIT, run_file(), grown, engine_settings()) == keep.made_of(
        UNIT, run_file(), facts(tasks=[own]), engine_settings()
    )


def test_results_of_different_making_have_folders_of_their_own(tmp_path: Path) -> None:
    one, two = (keep.unit_folder(tmp_path, "m", UNIT, sha256_json({"a": n})) for n in (1, 2))
    assert one != two


def test_a_whole_result_of_the_same_making_is_found(tmp_path: Path) -> None:
    key = write_result(tmp_path / "unit", {"a": 1})
    found = keep.find(tmp_path / "unit", key)
    assert found is not None
    assert found.key == key
    assert keep.find(tmp_path / "unit", sha256_json({"a": 2})) is None
    assert keep.find(tmp_path / "absent", key) is None


@pytest.mark.parametrize("name", [keep.RESULT, keep.SAMPLES])
def test_a_damaged_result_is_not_found_and_is_replaced(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "unit"
    key = write_result(folder, {"a": 1})
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    assert keep.find(folder, key) is None
    assert write_result(folder, {"a": 1}) == key
    assert keep.find(folder, key) is not None


@pytest.mark.parametrize("name", [keep.RESULT, keep.SAMPLES])
def test_a_result_of_which_a_file_is_gone_is_not_found(tmp_path: Path, name: str) -> None:
    key = write_result(tmp_path / "unit", {"a": 1})
    (tmp_path / "unit" / name).unlink()
    assert keep.find(tmp_path / "unit", key) is None


def test_a_result_moved_under_another_key_is_not_taken_for_it(tmp_path: Path) -> None:
    write_result(tmp_path / "unit", {"model": "one"})
    text = (tmp_path / "unit" / keep.RESULT).read_text()
    other = sha256_json({"model": "two"})
    (tmp_path / "unit" / keep.RESULT).write_text(text.replace(sha256_json({"model": "one"}), other))
    assert keep.find(tmp_path / "unit", other) is None


def test_a_folder_of_results_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        write_result(tmp_path / "unit", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "unit").stat().st_mode & 0o777 == 0o770


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), keep.new_folder(tmp_path / "unit") as part:
        (part / keep.SAMPLES).write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_job_left_half_written_goes_with_time_and_disturbs_nobody(tmp_path: Path) -> None:
    old, new = tmp_path / ".unit.abc.part", tmp_path / ".unit.def.part"
    for folder in (old, new):
        folder.mkdir()
        (folder / keep.SAMPLES).write_bytes(b"half")
    day_before_yesterday = time.time() - 2 * keep.LEFT_S
    os.utime(old, (day_before_yesterday, day_before_yesterday))
    key = write_result(tmp_path / "unit", {"a": 1})
    assert keep.find(tmp_path / "unit", key) is not None
    assert not old.exists()
    assert new.exists(), "another job may be writing it"


@pytest.mark.parametrize("task", ["../../etc/passwd", "/abs", "a/b", ".", "..", "x" * 500, "task with spaces\n"])
def test_whatever_a_task_is_called_its_folder_is_one_folder_of_its_model(tmp_path: Path, task: str) -> None:
    unit = UNIT.model_copy(update={"task": task})
    folder = keep.unit_folder(tmp_path, "m", unit, "0" * 64)
    assert folder.parent == tmp_path / "tasks" / "m"
    assert folder.resolve() == folder
    folder.mkdir(parents=True)
