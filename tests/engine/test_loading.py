"""Which of a model's files the engine reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_project import MODEL, started

from reproval import loading
from reproval.model_tensors import read_tensors

pytestmark = pytest.mark.engine

TEXT = ("The capital of France is", " Paris")


def answer(model: Path) -> tuple[float, bool]:
    from lm_eval.api.instance import Instance

    with started(model, **loading.arguments(model)) as lm:
        assert lm.model.llm_engine.vllm_config.model_config.hf_config.model_type == "llama"
        (found,) = lm.loglikelihood([Instance("loglikelihood", {}, TEXT, 0)], disable_tqdm=True)
    return found


def test_mistrals_own_copy_of_a_model_is_left_unread(tmp_path: Path) -> None:
    """vLLM by itself would take it, with the configuration in params.json."""
    expected = answer(MODEL)
    for path in MODEL.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    index = {"weight_map": {tensor.name: "model.safetensors" for tensor in read_tensors(MODEL)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    header = json.dumps({"output.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "consolidated.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    for name in ("params.json", "tekken.json"):
        (tmp_path / name).write_text("{}")
    assert answer(tmp_path) == expected
