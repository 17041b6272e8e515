"""What is counted without an engine is what lm-eval asks of one."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from demo_project import own_tasks

from reproval import engine
from reproval.facts import make_facts
from reproval.model_facts import ModelError
from reproval.records import Facts, Hardware
from reproval.run_file import RunFile
from reproval.seeds import seeds
from reproval.settings import ModelConfig, Run, TaskSettings, Unit
from reproval.stage import stage_model
from reproval.task_facts import encoder, unit_facts
from reproval.tasks import TaskError, UnknownTask, all_requests, chat_arguments, manager

BASE = Path(__file__).resolve().parents[2]
MODEL = BASE / "resources/demo/SmolLM2-135M-Instruct"
TASKS = str(BASE / "config/demo/tasks")

pytestmark = pytest.mark.skipif(not (MODEL / "tokenizer.json").exists(), reason="needs the demo's model: make model")


def unit(task: str, **settings: Any) -> Unit:
    return Unit(suite="demo", task=task, include_path=TASKS, unsafe_code=False, settings=TaskSettings(**settings))


def silent() -> Any:
    """A model that answers nothing sensible, and keeps the tokens that lm-eval itself makes of its requests."""

    class Silent(type(encoder(str(MODEL), ModelConfig()))):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            self.pairs = [(context, continuation) for _, context, continuation in requests]
            return [(0.0, False)] * len(requests)

    return Silent()


def asked_by_lm_eval(entry: Unit) -> list[Any]:
    """The requests that simple_evaluate makes of a model, which answers nothing sensible."""
    from lm_eval import simple_evaluate

    asked: list[Any] = []

    class Recorder(type(silent())):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            asked.extend(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            asked.extend(requests)
            return [-1.0] * len(requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            asked.extend(requests)
            return [""] * len(requests)

    settings = entry.settings
    simple_evaluate(
        model=Recorder(),
        tasks=[entry.task],
        task_manager=manager(entry.include_path),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        gen_kwargs=dict(settings.generation) if settings.generation else None,
        bootstrap_iters=0,
        log_samples=False,
        **chat_arguments(settings),
        **seeds(None),
    )
    return asked


@pytest.mark.parametrize(
    "entry",
    [
        unit("demo_opposites"),
        unit("demo_opposites", num_fewshot=1, limit=5),
        unit("demo_opposites", limit=0.25),
        unit("demo_opposites", apply_chat_template=True, fewshot_as_multiturn=False, system_instruction="Be brief."),
        unit("demo_endings", num_fewshot=3),
        unit("demo_counting"),
        unit("demo_counting", generation={"max_gen_toks": 3}, apply_chat_template=True),
        unit("demo_prose"),
    ],
    ids=lambda entry: f"{entry.task}-{len(entry.settings.model_dump(exclude_none=True))}",
)
def test_the_counted_requests_are_those_that_lm_eval_makes(entry: Unit) -> None:
    model = silent()
    (facts,) = unit_facts(entry, None, model)
    asked = asked_by_lm_eval(entry)
    assert facts.requests == len(asked)
    assert facts.documents == len({request.doc_id for request in asked})
    assert {request.request_type for request in asked} == {facts.request_type}
    if facts.request_type == "loglikelihood":
        model.loglikelihood(asked, disable_tqdm=True)
        lengths = [len(context) + len(continuation) for context, continuation in model.pairs]
        assert facts.continuation_tokens == sum(len(continuation) for _, continuation in model.pairs)
    elif facts.request_type == "generate_until":
        new = [request.args[1]["max_gen_toks"] for request in asked]
        lengths = [len(model.tok_encode(request.args[0])) + n for request, n in zip(asked, new, strict=True)]
        assert facts.generation_tokens == sum(new)
    else:
        lengths = [1 + len(model.tok_encode(request.args[0])) for request in asked]
    assert facts.longest_request_tokens == max(lengths)
    assert sum(length * count for length, count in facts.lengths.items()) == sum(lengths)


def test_a_template_is_compiled_once_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import utils

    compiled: list[str] = []
    compile_template = utils.env.compile

    def counted(source: str, *arguments: Any, **more: Any) -> Any:
        compiled.append(source)
        return compile_template(source, *arguments, **more)

    manager(TASKS)
    utils.env.from_string.cache_clear()
    monkeypatch.setattr(utils.env, "compile", counted)
    unit_facts(unit("demo_opposites"), None, encoder(str(MODEL), ModelConfig()))
    assert compiled
    assert len(compiled) == len(set(compiled))


def test_every_choice_of_the_one_token_task_is_one_token() -> None:
    (facts,) = unit_facts(unit("demo_opposites"), None, encoder(str(MODEL), ModelConfig()))
    assert facts.one_token_continuations == facts.requests
    # The shots are shared: most of every context is in the cache already.
    assert facts.unique_prefix_tokens < facts.context_tokens / 4


def test_the_hash_of_a_task_follows_its_prompts_and_nothing_else() -> None:
    def hash_of(**settings: Any) -> str:
        return unit_facts(unit("demo_opposites", **settings), None, encoder(str(MODEL), ModelConfig()))[0].task_hash

    assert hash_of() == hash_of()
    assert len({hash_of(), hash_of(num_fewshot=1), hash_of(limit=3), hash_of(apply_chat_template=True)}) == 4


def test_the_hash_of_a_task_follows_the_answers_that_are_right(tmp_path: Path) -> None:
    def hash_of(folder: Path) -> str:
        entry = unit("demo_opposites").model_copy(update={"include_path": str(folder)})
        return unit_facts(entry, None, encoder(str(MODEL), ModelConfig()))[0].task_hash

    corrected = shutil.copytree(TASKS, tmp_path / "corrected")
    data = corrected / "data/opposites.jsonl"
    data.write_text(data.read_text().replace('"answer": 0', '"answer": 1', 1))
    assert hash_of(corrected) != hash_of(Path(TASKS))


@pytest.mark.parametrize(
    ("given", "generation", "drawn"),
    [
        ("do_sample: false", None, False),
        ("temperature: 0.5", None, False),
        ("top_p: 0.9", None, True),
        ("top_p: 0.9", {"do_sample": False}, False),
    ],
)
def test_answers_that_vllm_draws_though_nobody_asked_are_known_beforehand(
    tmp_path: Path, given: str, generation: dict[str, Any] | None, drawn: bool
) -> None:
    from lm_eval.models.vllm_causallms import VLLM

    folder = shutil.copytree(TASKS, tmp_path / "tasks")
    text = (folder / "counting.yaml").read_text()
    assert "do_sample: false" in text
    (folder / "counting.yaml").write_text(text.replace("do_sample: false", given))
    entry = unit("demo_counting", generation=generation).model_copy(update={"include_path": str(folder)})
    (facts,) = unit_facts(entry, None, encoder(str(MODEL), ModelConfig()))
    assert facts.sampled_unasked == drawn
    params = [VLLM.modify_gen_kwargs(request.args[1])[0] for request in asked_by_lm_eval(entry)]
    assert all(("temperature" not in each) == drawn for each in params)


@pytest.mark.parametrize("asked", [True, False])
def test_the_chat_template_is_named_by_its_hash_where_it_is_applied(asked: bool) -> None:
    entry = unit("demo_opposites", limit=2, apply_chat_template=asked)
    run = SimpleNamespace(seed=None)  # all that is read of a run
    model = silent()
    results, _ = engine.scored_by_lm_eval(model, entry, run)
    template = model.tokenizer.chat_template.encode()
    assert results.get("chat_template_sha") == (hashlib.sha256(template).hexdigest() if asked else None)


def test_the_chat_template_that_is_named_is_applied() -> None:
    model = silent()
    both = {"default": model.tokenizer.chat_template, "short": "{% for m in messages %}{{ m.content }}!{% endfor %}"}
    model.tokenizer.chat_template = both

    def asked(template: bool | str) -> tuple[str, Any]:
        entry = unit("demo_opposites", num_fewshot=0, limit=1, apply_chat_template=template)
        results, samples = engine.scored_by_lm_eval(model, entry, SimpleNamespace(seed=None))
        prompt = samples["demo_opposites"][0]["arguments"][0][0]
        assert prompt == all_requests(entry, None, model)["loglikelihood"][0].args[0]
        return prompt, results["chat_template_sha"]

    assert asked("short") == ("The opposite of up is!", hashlib.sha256(both["short"].encode()).hexdigest())
    assert asked("default") == asked(True)
    with pytest.raises(TaskError, match=r"'shrt' is no chat template .* those named default, short"):
        asked("shrt")
    model.tokenizer.chat_template = both["short"]
    with pytest.raises(TaskError, match=r"'short' is no chat template .* write true"):
        asked("short")
    model.tokenizer.chat_template = None
    with pytest.raises(TaskError, match="has no chat template"):
        asked(True)


@pytest.mark.parametrize(
    ("told", "prompt"),
    [
        ({}, "/nothink"),
        ({"enable_thinking": False}, "/nothink"),
        ({"enable_thinking": True, "think_end_token": "</think>", "chat_template_args": {"effort": "low"}}, "low"),
    ],
)
def test_prompts_are_rendered_as_lm_evals_model_renders_them(told: dict[str, Any], prompt: str) -> None:
    model = encoder(str(MODEL), ModelConfig(**told))
    # As GLM-4.5 and others tell what was left out from what is not true.
    model.tokenizer.chat_template = (
        "{% if enable_thinking is defined and not enable_thinking %}/nothink{% endif %}{{ effort }}"
    )
    theirs = pytest.importorskip("lm_eval.models.vllm_causallms").VLLM
    default = signature(theirs.__init__).parameters["enable_thinking"].default
    stock = SimpleNamespace(
        tokenizer=model.tokenizer,
        hf_chat_template=None,
        enable_thinking=told.get("enable_thinking", default),
        chat_template_args=told.get("chat_template_args", {}),
    )
    history = [{"role": "user", "content": "?"}]
    assert model.apply_chat_template(history) == theirs.apply_chat_template(stock, history) == prompt


def tokenizer_folder(folder: Path, **config: Any) -> Path:
    """The demo's tokenizer beside a config.json of another model."""
    folder.mkdir()
    for path in MODEL.glob("*token*"):
        shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_template_of_a_processor_is_taken_as_vllm_takes_it(tmp_path: Path) -> None:
    renderers = pytest.importorskip("vllm.renderers.hf")
    folder = tokenizer_folder(tmp_path / "m", model_type="qwen2_audio")
    processor = {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "Qwen2AudioProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = encoder(str(folder), ModelConfig())
    assert model.apply_chat_template([{"role": "user", "content": "?"}]) == "[?]"
    chosen = renderers._try_get_processor_chat_template(
        model.tokenizer, revision=None, code_revision=None, trust_remote_code=False
    )
    assert model.hf_chat_template == chosen == template
    (folder / "preprocessor_config.json").unlink()
    (folder / "chat_template.json").unlink()
    assert encoder(str(folder), ModelConfig()).hf_chat_template is None


def test_a_mistral_model_is_encoded_as_the_engine_encodes_it(tmp_path: Path) -> None:
    """transformers by itself would read Mistral's own tekken.json."""
    get_tokenizer = pytest.importorskip("vllm.tokenizers").get_tokenizer
    folder = tokenizer_folder(tmp_path / "m", model_type="mistral")
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    shutil.copy(next(data.glob("tekken*.json")), folder / "tekken.json")
    theirs = get_tokenizer(str(folder), tokenizer_mode="hf")
    ours = encoder(str(folder), ModelConfig())
    assert ours.tok_encode("Hello world") == theirs("Hello world").input_ids
    assert ours.tokenizer.chat_template == theirs.chat_template is not None


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownTask, match="did you mean 'demo_opposites'"):
        unit_facts(unit("demo_oposites"), None, encoder(str(MODEL), ModelConfig()))


def test_the_same_samples_make_the_same_file(tmp_path: Path) -> None:
    rows = [{"doc_id": 1, "filter": "none", "acc": 1.0}, {"doc_id": 0, "filter": "none", "acc": 0.0}]
    engine.write_samples(tmp_path / "a.gz", {"t": rows})
    engine.write_samples(tmp_path / "b.gz", {"t": rows[::-1]})
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    with gzip.open(tmp_path / "a.gz", "rt") as stream:
        lines = [json.loads(line) for line in stream]
    assert [(line["task"], line["doc_id"]) for line in lines] == [("t", 0), ("t", 1)]


# --- counts that are kept ------------------------------------------------------------------------------------------


class Counting:
    """A project of two models that share a tokenizer and of tasks of its own; `tokenized` are the texts so far."""

    def __init__(self, folder: Path, tokenized: list[Any]) -> None:
        self.folder, self.tokenized = folder, tokenized
        self.results = folder / "results"
        self.tasks = folder / "tasks"
        self.tasks.mkdir()
        own_tasks(self.tasks)
        self.change(self.tasks / "sums_asked.yaml", "num_fewshot: 0\n", "")
        for name in ("small", "large"):
            self.model(name).mkdir()
            for path in MODEL.iterdir():
                if path.suffix != ".safetensors":
                    shutil.copy(path, self.model(name))
            # Of weights the header is read.
            header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
            data = len(header).to_bytes(8, "little") + header + bytes(8)
            (self.model(name) / "model.safetensors").write_bytes(data)
        self.change(
            self.model("large") / "config.json", '"max_position_embeddings": 8192', '"max_position_embeddings": 4096'
        )
        self.change(self.model("large") / "generation_config.json", "{", '{"temperature": 0.6, ')

    def model(self, name: str) -> Path:
        return self.folder / name

    @staticmethod
    def change(path: Path, old: str, new: str) -> Any:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    @property
    def kept(self) -> list[Path]:
        return sorted((self.results / "work/facts").iterdir())

    def facts(
        self,
        model: str,
        suite: str = "s",
        task: str = "sums",
        environment: str = "lock",
        seed: int | None = None,
        told: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Facts:
        """As `python -m reproval.facts` finds them."""
        unit = Unit(
            suite=suite,
            task=task,
            include_path=str(self.tasks),
            unsafe_code=False,
            settings=TaskSettings(**({"limit": 6} | settings)),
        )
        asked = ModelConfig(path=str(self.model(model)), **(told or {}))
        run = RunFile(
            run=Run(name=f"{model}-000000000000", model_name=model, model=asked, units=[unit], identity={}),
            hardware=Hardware(gpus=0, host_memory_bytes=2**33, cpus=2),
            policy="auto",
            seed=seed,
            batch_invariant=False,
            container=None,
            environment=environment,
            store="resources",
        )
        del self.tokenized[:]
        return make_facts(run, stage_model(model, asked, Path("resources")), self.results)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    tokenized: list[Any] = []
    encode = TokenizersBackend._encode_plus

    def recorded(self: Any, text: Any, *arguments: Any, **more: Any) -> Any:
        tokenized.append(text)
        return encode(self, text, *arguments, **more)

    # The last Python before the tokenizers library.
    monkeypatch.setattr(TokenizersBackend, "_encode_plus", recorded)
    return Counting(tmp_path, tokenized)


def test_models_that_share_a_tokenizer_are_counted_once(counting: Counting) -> None:
    first = counting.facts("small")
    assert counting.tokenized
    (kept,) = counting.kept
    second = counting.facts("large", suite="other")
    assert counting.tokenized == []
    assert counting.kept == [kept]
    assert second.model_facts.max_position_embeddings == 4096
    assert [task.suite for task in second.tasks] == ["other", "other"]
    assert [task.model_copy(update={"suite": "s"}) for task in second.tasks] == first.tasks
    again = counting.facts("small", apply_chat_template=False, fewshot_as_multiturn=True)
    assert counting.tokenized == [], "settings that change no request are no reason"
    assert again == first


def test_what_may_change_a_token_is_counted_again(counting: Counting) -> None:
    c, small = counting, counting.model("small")
    changes: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: c.change(small / "tokenizer.json", '"ignore_merges":false', '"ignore_merges":true'),
        "its settings": lambda: c.change(small / "tokenizer_config.json", "{", '{"clean": true, '),
        "a file of the chat template": lambda: (small / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        "the model's type": lambda: c.change(small / "config.json", '"model_type": "llama"', '"model_type": "qwen2"'),
        "task": lambda: c.change(c.tasks / "sums_asked.yaml", "Question:", "Asked:"),
        "data set": lambda: c.change(c.tasks / "data/sums.jsonl", "a cow", "a calf"),
        "shots": lambda: {"num_fewshot": 1},
        "limit": lambda: {"limit": 5},
        "seed": lambda: {"num_fewshot": 1, "seed": 7},
        "chat template": lambda: {"apply_chat_template": True},
        "another task": lambda: {"task": "sums_drawn"},
        "repeats": lambda: c.change(c.tasks / "sums_drawn.yaml", "repeats: 3", "repeats: 2") or {"task": "sums_drawn"},
        "packages": lambda: {"environment": "another lock"},
    }
    c.facts("small")
    for number, (name, change) in enumerate(changes.items(), 2):
        made = change()
        settings = made if isinstance(made, dict) else {}
        found = c.facts("small", **settings)
        assert c.tokenized, name
        assert len(c.kept) == number, name
        assert c.facts("small", **settings) == found, name
        assert c.tokenized == [], name
        shutil.move(c.results, c.folder / "aside")
        assert c.facts("small", **settings) == found, name
        shutil.rmtree(c.results)
        shutil.move(c.folder / "aside", c.results)


def test_files_that_are_not_what_was_written_are_counted_again(counting: Counting) -> None:
    right = counting.facts("small")
    (kept,) = counting.kept
    text = kept.read_text()
    counting.facts("small", limit=5)
    (other,) = set(counting.kept) - {kept}
    tampered = text.replace(f'"requests": {right.tasks[0].requests}', '"requests": 1000000', 1)
    foreign = other.read_text()
    rekeyed = foreign.replace(json.loads(foreign)["key"], json.loads(text)["key"])
    half = text[: len(text) // 2]
    for content in (half, half + "\x80" * 9, "", "[]", tampered, foreign, rekeyed):
        assert content != text
        kept.write_text(content, encoding="latin-1")
        assert counting.facts("small") == right
        assert counting.tokenized, content[:200]
        assert kept.read_text() == text


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("config.json", '"vocab_size"', '"vocab"', "number of layers, hidden size or vocabulary size not found"),
        (
            "tokenizer.json",
            "{",
            "[",
            r"small: its tokenizer cannot be loaded: \w+: .*; expected the files that",
        ),
        ("config.json", '"llama"', '"lama9"', "config.json: model_type is 'lama9'; .* write trust_remote_code: true"),
        ("tokenizer_config.json", "_token", "_toke", "names neither bos_token nor eos_token"),
    ],
)
def test_a_model_that_cannot_be_read_is_named(counting: Counting, file: str, old: str, new: str, said: str) -> None:
    path = counting.model("small") / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ModelError, match=said):
        counting.facts("small")


def test_a_model_that_thinks_is_refused_tasks_that_read_log_probabilities(counting: Counting) -> None:
    told = {"enable_thinking": True, "think_end_token": "</think>"}
    assert counting.facts("small", task="sums_drawn", told=told, apply_chat_template=True).tasks
    with pytest.raises(ModelError, match="enable_thinking: true, and sums_asked and 1 more are scored by log-prob"):
        counting.facts("small", told=told, apply_chat_template=True)
    assert counting.facts("small", told=told | {"enable_thinking": False}, apply_chat_template=True).tasks


def test_a_configuration_of_other_weights_is_refused_before_anything_is_counted(counting: Counting) -> None:
    (counting.model("small") / "model.safetensors").unlink()
    (counting.model("small") / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    counting.change(counting.model("small") / "config.json", '"vocab_size": 49152', '"vocab_size": 49000')
    with pytest.raises(ModelError, match=r"small/config\.json: vocab_size\n  found:    49000"):
        counting.facts("small")
    assert not counting.tokenized


def test_a_token_that_the_model_does_not_know_is_refused(counting: Counting) -> None:
    assert counting.facts("small").tasks[0].largest_token < 49152
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [40, 1], "data_offsets": [0, 160]}}
    ).encode()
    file = counting.model("small") / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(160))
    with pytest.raises(ModelError, match=r"small: its tokenizer makes token \d+ of task \w+, and .* tokens 0 to 39;"):
        counting.facts("small")
