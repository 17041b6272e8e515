"""Scores of ReprovalVLLM against lm-eval's own vLLM model: same engine, same weights, real CPU build."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from reproval.encoding import encode_pairs
from reproval.records import ScoringPath

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from reproval.scoring import ReprovalVLLM

pytestmark = pytest.mark.engine

MODEL = Path(os.environ.get("REPROVAL_TEST_MODEL", "resources/demo/SmolLM2-135M-Instruct"))
BLOCK = 32
MAX_LEN = 160
# float32 leaves only the order of additions; bfloat16 rounds at 2^-8 in each of 30 layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.35}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[ReprovalVLLM]:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    if not (MODEL / "config.json").exists():
        pytest.skip(f"no model at {MODEL}: set REPROVAL_TEST_MODEL, or stage the demo model")
    patch = pytest.MonkeyPatch()
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        patch.setenv(name, value)
    from vllm.distributed import cleanup_dist_env_and_memory

    from reproval.scoring import ReprovalVLLM

    lm = ReprovalVLLM(
        str(MODEL),
        dtype=request.param,
        max_model_len=MAX_LEN,
        enforce_eager=True,
        block_size=BLOCK,
        max_num_batched_tokens=1024,
        max_num_seqs=32,
        submit_batch=16,
    )
    yield lm
    del lm.model
    gc.collect()
    cleanup_dist_env_and_memory()
    patch.undo()


@pytest.fixture
def model(engine: ReprovalVLLM) -> Iterator[ReprovalVLLM]:
    """The engine with default settings."""
    model = engine
    model.reset_paths()
    yield model
    model.scoring = "auto"
    model.submit_batch = 16
    model.on_progress = None
    model.request_cache = None


def instances(task: str, pairs: list[tuple[str, str]]) -> list[Instance]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, index, (task, 0, 1)) for index, pair in enumerate(pairs)]


def same_as_stock(model: ReprovalVLLM, requests: list[Instance]) -> list[Any]:
    """Score both ways and compare; gives ours."""
    model.scoring = "stock"
    stock = model.loglikelihood(requests, disable_tqdm=True)
    model.scoring = "auto"
    model.reset_paths()
    ours = model.loglikelihood(requests, disable_tqdm=True)
    dtype = str(model._engine_config.model_config.dtype).removeprefix("torch.")
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in stock], abs=TOLERANCE[dtype])
    if dtype == "float32":
        assert [flag for _, flag in ours] == [flag for _, flag in stock]
    return ours


def context_of(model: ReprovalVLLM, tokens: int) -> str:
    """A text of exactly so many tokens."""
    text = "The list says: one"
    while len(model.tok_encode(text)) < tokens:
        text += " two"
    assert len(model.tok_encode(text)) == tokens
    return text


QUESTION = "Question: What is the capital of France? Choices: A. Rome B. Paris C. Madrid D. Berlin Answer:"


def test_choices_of_one_token_are_scored_without_prompt_rows(model: ReprovalVLLM) -> None:
    requests = instances("letters", [(QUESTION, f" {letter}") for letter in "ABCD"])
    same_as_stock(model, requests)
    assert model.paths["letters"] == ScoringPath(requests=4, one_token=4)


def test_long_and_mixed_choices(model: ReprovalVLLM) -> None:
    choices = [" Paris", " the city of Paris in France", " the city of Rome", " Madrid", " Berlin, in Germany"]
    requests = instances("mixed", [(QUESTION, choice) for choice in choices])
    requests += instances("roof", [(f"He is on roof {n}. He", f" starts to pull {n} tiles off it") for n in range(6)])
    same_as_stock(model, requests)
    paths = model.paths
    assert paths["mixed"].stock == paths["roof"].stock == paths["mixed"].second_pass == 0
    assert paths["mixed"].one_token + paths["mixed"].suffix == 5


@pytest.mark.parametrize("tokens", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_contexts_at_block_boundaries_with_shared_first_tokens(model: ReprovalVLLM, tokens: int) -> None:
    context = context_of(model, tokens)
    endings = [" three four five", " three four six", " three", " nine ten", " nine ten eleven", " four"]
    requests = instances("boundary", [(context, ending) for ending in endings])
    same_as_stock(model, requests)
    assert model.paths["boundary"].second_pass == 0


def test_rows_hidden_by_an_earlier_window_are_scored_in_a_second_pass(model: ReprovalVLLM) -> None:
    context = context_of(model, 2 * BLOCK)
    requests = instances("again", [(context, " three four"), (context, " five six")])
    model.submit_batch = 1  # The second request is planned without knowledge of the first.
    same_as_stock(model, requests)
    assert model.paths["again"].second_pass == 1


def test_empty_context_spaces_and_the_prefix_token_itself(model: ReprovalVLLM) -> None:
    pairs = [
        ("", "Hello world"),
        ("", "Hello there, you"),
        ("", "<|endoftext|>abc"),
        ("Hello ", "world"),
        ("Hello", " world"),
    ]
    requests = instances("odd", [*pairs, ("A b c d", "efg"), ("a\n\n", "b c")])
    same_as_stock(model, requests)


def test_cut_requests_are_cut_as_stock_cuts_and_counted(model: ReprovalVLLM) -> None:
    long = "word " * 300
    pairs = [(long, " end of it"), (long, " end"), ("short", " end"), ("x", " many words" * 150)]
    same_as_stock(model, instances("cut", pairs))
    assert model.paths["cut"].cut == 3


def test_a_continuation_that_leaves_no_context_is_refused(model: ReprovalVLLM) -> None:
    continuation = " word" * (MAX_LEN - 1)
    with pytest.raises(ValueError, match="task full: a continuation has no token before it"):
        model.loglikelihood(instances("full", [("x", continuation)]), disable_tqdm=True)


def test_duplicates_are_scored_once(model: ReprovalVLLM) -> None:
    pairs = [(QUESTION, " Paris"), (QUESTION, " in the city of Rome")] * 20  # Over several windows of 16.
    ours = model.loglikelihood(instances("twice", pairs), disable_tqdm=True)
    assert ours[:2] * 20 == ours
    assert model.paths["twice"].duplicates == 38


def test_is_greedy_of_words_that_the_model_would_write(model: ReprovalVLLM) -> None:
    from lm_eval.api.instance import Instance

    context = "Monday, Tuesday, Wednesday, Thursday"
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    (written,) = model.generate_until(
        [Instance("generate_until", {}, (context, settings), 0, ("write", 0, 1))], disable_tqdm=True
    )
    first, *rest = model.tok_encode(written)
    assert model.tok_encode(context + written) == [*model.tok_encode(context), first, *rest]
    one = model.tokenizer.decode([first])
    pairs = [(context, written), (context, written + " dog dog"), (context, one), (context, " dog")]
    ours = same_as_stock(model, instances("last_word", pairs))
    assert [flag for _, flag in ours] == [True, False, True, False]


def test_rolling_equals_stock_over_several_windows(model: ReprovalVLLM) -> None:
    from lm_eval.api.instance import Instance

    texts = ["", "A fox.", "The quick brown fox jumps over the lazy dog. " * 40]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("roll", 0, 1)) for text in texts]
    ours = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert model.paths["roll"] == ScoringPath(requests=3, suffix=2)
    model.scoring = "stock"
    stock = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(stock, rel=2e-3, abs=1e-4)


def test_generation_equals_stock_and_equal_prompts_are_generated_once(model: ReprovalVLLM) -> None:
    from lm_eval.api.instance import Instance

    def requests(sampled: bool) -> list[Instance]:
        settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": sampled, "temperature": 1.0 if sampled else 0.0}
        return [
            Instance("generate_until", {}, (f"Count: {n % 3} and then", dict(settings)), 0, ("gen", n, 1))
            for n in range(5)
        ]

    ours = model.generate_until(requests(sampled=False), disable_tqdm=True)
    assert model.paths["gen"].duplicates == 2
    assert model.paths["gen"].ended_by_length == sum(len(model.tok_encode(text)) == 8 for text in ours) > 0
    model.scoring = "stock"
    assert ours == model.generate_until(requests(sampled=False), disable_tqdm=True)
    model.scoring = "auto"
    model.reset_paths()
    model.generate_until(requests(sampled=True), disable_tqdm=True)
    assert (model.paths["gen"].duplicates, model.paths["gen"].sampled) == (0, 5)


@pytest.mark.parametrize("scoring", ["auto", "stock"])
@pytest.mark.parametrize(("told", "sampled"), [({}, 1), ({"do_sample": False}, 0), ({"temperature": 0.0}, 0)])
def test_answers_that_nobody_asked_to_be_greedy_are_drawn_and_counted(
    model: ReprovalVLLM, scoring: Literal["auto", "stock"], told: dict[str, Any], sampled: int
) -> None:
    """lm-eval's vLLM model leaves the temperature to vLLM where a task names none, and that is 1."""
    from lm_eval.api.instance import Instance

    model.scoring = scoring
    settings = {"until": ["."], "max_gen_toks": 4} | told
    model.generate_until([Instance("generate_until", {}, ("Count:", settings), 0, ("d", 0, 1))], disable_tqdm=True)
    assert model.paths["d"].sampled == sampled


def test_thoughts_are_taken_from_answers_as_stock_takes_them(
    model: ReprovalVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task's own stop, here a full stop, does not end a thought, and ends the answer that follows it."""
    from lm_eval.api.instance import Instance

    def answers(end: str | None, scoring: Literal["auto", "stock"]) -> list[str]:
        monkeypatch.setattr(model, "think_end_token", end)
        model.scoring = scoring
        settings = {"until": ["."], "max_gen_toks": 40, "do_sample": False}
        asked = ["The capital of France is Paris. The capital of", "One, two. Three, four. Five, six."]
        requests = [Instance("generate_until", {}, (text, dict(settings)), 0, ("gen", 0, 1)) for text in asked]
        return model.generate_until(requests, disable_tqdm=True)

    spoken = answers(None, "auto")
    (word, *_) = spoken[0].split()
    assert answers(word, "auto") == answers(word, "stock") != spoken
    assert all("." not in text for text in answers(word, "auto"))


@pytest.mark.parametrize("scoring", ["auto", "stock"])
def test_a_prompt_that_is_cut_for_generation_is_counted(model: ReprovalVLLM, scoring: Literal["auto", "stock"]) -> None:
    from lm_eval.api.instance import Instance

    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    texts = ["Count:", context_of(model, MAX_LEN)]
    model.scoring = scoring
    model.generate_until(
        [Instance("generate_until", {}, (text, dict(settings)), 0, ("long", n, 1)) for n, text in enumerate(texts)],
        disable_tqdm=True,
    )
    # lm-eval's own code does not tell how an answer ended.
    ended = 2 if scoring == "auto" else 0
    assert model.paths["long"] == ScoringPath(requests=2, stock=2, cut=1, ended_by_length=ended)


def test_a_prompt_without_room_beside_its_answer_counts_as_cut(model: ReprovalVLLM) -> None:
    from lm_eval.api.instance import Instance

    settings = {"until": ["\n\n"], "max_gen_toks": MAX_LEN, "do_sample": False}
    request = Instance("generate_until", {}, ("Count:", settings), 0, ("long", 0, 1))
    prompt = model._prompt(0, request, model.tok_encode("Count:"), eos="<eos>")
    assert len(prompt.tokens) == len(model.tok_encode("Count:")), "lm-eval keeps tokens[-0:], which are all"
    assert prompt.cut


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_the_engine_works_while_the_next_window_is_encoded(
    model: ReprovalVLLM, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding the third window waits for a step of the engine, which comes only if the engine need not wait for it."""
    from lm_eval.api.instance import Instance

    monkeypatch.setattr("reproval.scoring.TEXTS_AT_ONCE", 40)
    model.submit_batch = 40  # More than the engine takes at once, so that a window is more than one step.
    settings = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    texts = [f"Count {n} and more" for n in range(120)]
    further = {"loglikelihood": (" of it",), "generate_until": (settings,)}.get(method, ())
    requests = [Instance(method, {}, (text, *further), 0, ("ahead", n, 1)) for n, text in enumerate(texts)]
    encode, step = model.tok_encode, model.model.llm_engine.step
    stepped, came = threading.Event(), []

    def slow_encode(strings: Any, *args: Any, **kwargs: Any) -> Any:
        # Of a window's contexts and its whole texts the first: by the second the engine may have run all that it has.
        if "Count 80 and" in str(strings) and not came:
            stepped.clear()
            came.append(stepped.wait(20))
        return encode(strings, *args, **kwargs)

    def told_step() -> Any:
        stepped.set()
        return step()

    monkeypatch.setattr(model, "tok_encode", slow_encode)
    monkeypatch.setattr(model.model.llm_engine, "step", told_step)
    getattr(model, method)(requests, disable_tqdm=True)
    assert came == [True]


def test_an_interrupted_call_goes_on_from_the_cache(model: ReprovalVLLM, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from reproval.request_cache import RequestCache

    requests = instances("kept", [(f"Item {n} is", f" number {n} of the list") for n in range(24)])
    generate = [
        Instance(
            "generate_until",
            {},
            (f"Count {n}:", {"until": ["."], "max_gen_toks": 4, "do_sample": False}),
            0,
            ("g", n, 1),
        )
        for n in range(6)
    ]
    plain = model.loglikelihood(requests, disable_tqdm=True)
    texts = model.generate_until(generate, disable_tqdm=True)
    ended = model.paths["g"].ended_by_length
    assert ended
    model.reset_paths()
    model.submit_batch = 4

    class Preempted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise Preempted

    for first in (True, False):
        model.request_cache = RequestCache(tmp_path, "this model")
        model.on_progress = stop if first else None
        if first:
            with pytest.raises(Preempted):
                model.loglikelihood(requests, disable_tqdm=True)
        else:
            assert [v for v, _ in model.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(
                [v for v, _ in plain], abs=0.35
            )
            assert 9 <= model.paths["kept"].cached < 24
            assert model.generate_until(generate, disable_tqdm=True) == texts
        model.request_cache.close()
        model.reset_paths()
    model.request_cache = RequestCache(tmp_path, "this model")
    again = model.loglikelihood(requests, disable_tqdm=True)
    assert model.generate_until(generate, disable_tqdm=True) == texts
    assert model.paths["kept"].cached == 24
    assert (model.paths["g"].cached, model.paths["g"].ended_by_length) == (6, ended)
    model.request_cache.close()
    assert len(again) == 24
    model.request_cache = RequestCache(tmp_path, "another model")
    model.reset_paths()
    model.loglikelihood(requests[:2], disable_tqdm=True)
    assert model.paths["kept"].cached == 0
    model.request_cache.close()


def test_progress_counts_every_request(model: ReprovalVLLM) -> None:
    seen: list[tuple[int, int]] = []
    model.on_progress = lambda done, total: seen.append((done, total))
    model.loglikelihood(instances("p", [(QUESTION, f" {letter}") for letter in "ABAB"]), disable_tqdm=True)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("scoring", ["auto", "stock"])
def test_a_log_probability_that_is_no_number_is_counted(model: ReprovalVLLM, scoring: Any) -> None:
    (kept,) = model.model.apply_model(lambda network: network.model.norm.weight.detach().clone())
    model.scoring = scoring
    model.model.apply_model(lambda network: network.model.norm.weight.data.fill_(math.nan))
    try:
        model.loglikelihood(instances("broken", [("What a", " day"), ("What a", " nice day")]), disable_tqdm=True)
    finally:
        model.model.apply_model(lambda network: network.model.norm.weight.data.copy_(kept))
        model.scoring = "auto"
    assert model.paths["broken"].not_a_number == 2


def test_encoding_is_lm_evals_own(model: ReprovalVLLM) -> None:
    pairs = [
        ("Hello ", "world"),
        ("Hello", "world"),
        ("a\n\n", "b c"),
        ("   ", "x"),
        ("naïve caf", "é au lait"),
        ("1", "23"),
    ]
    expected = [model._encode_pair(*pair) for pair in pairs]
    encoded = encode_pairs(model, pairs)
    assert [(context.tolist(), continuation.tolist()) for context, continuation in encoded] == expected
