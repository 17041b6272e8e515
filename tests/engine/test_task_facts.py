"""What is counted without an engine is what lm-eval asks of one."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reproval import engine
from reproval.seeds import seeds
from reproval.settings import TaskSettings, Unit
from reproval.task_facts import encoder, unit_facts
from reproval.tasks import UnknownTask, chat_arguments, manager

BASE = Path(__file__).resolve().parents[2]
MODEL = BASE / "resources/demo/SmolLM2-135M-Instruct"
TASKS = str(BASE / "config/demo/tasks")

pytestmark = pytest.mark.skipif(not (MODEL / "tokenizer.json").exists(), reason="needs the demo's model: make model")


def unit(task: str, **settings: Any) -> Unit:
    return Unit(suite="demo", task=task, include_path=TASKS, unsafe_code=False, settings=TaskSettings(**settings))


def asked_by_lm_eval(entry: Unit) -> list[Any]:
    """The requests that simple_evaluate makes of a model, which answers nothing sensible."""
    from lm_eval import simple_evaluate

    base = encoder(str(MODEL), False)
    asked: list[Any] = []

    class Recorder(type(base)):  # type: ignore[misc]
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
    model = encoder(str(MODEL), False)
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


def test_every_choice_of_the_one_token_task_is_one_token() -> None:
    (facts,) = unit_facts(unit("demo_opposites"), None, encoder(str(MODEL), False))
    assert facts.one_token_continuations == facts.requests
    # The shots are shared: most of every context is in the cache already.
    assert facts.unique_prefix_tokens < facts.context_tokens / 4


def test_the_hash_of_a_task_follows_its_prompts_and_nothing_else() -> None:
    def hash_of(**settings: Any) -> str:
        return unit_facts(unit("demo_opposites", **settings), None, encoder(str(MODEL), False))[0].task_hash

    assert hash_of() == hash_of()
    assert len({hash_of(), hash_of(num_fewshot=1), hash_of(limit=3), hash_of(apply_chat_template=True)}) == 4


@pytest.mark.parametrize("asked", [True, False])
def test_the_chat_template_is_named_by_its_hash_where_it_is_applied(asked: bool) -> None:
    entry = unit("demo_opposites", limit=2, apply_chat_template=asked)
    run = SimpleNamespace(seed=None)  # all that is read of a run
    model = encoder(str(MODEL), False)
    results, _ = engine.scored_by_lm_eval(model, entry, run)
    template = model.tokenizer.chat_template.encode()
    assert results.get("chat_template_sha") == (hashlib.sha256(template).hexdigest() if asked else None)


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownTask, match="did you mean 'demo_opposites'"):
        unit_facts(unit("demo_oposites"), None, encoder(str(MODEL), False))


def test_the_same_samples_make_the_same_file(tmp_path: Path) -> None:
    rows = [{"doc_id": 1, "filter": "none", "acc": 1.0}, {"doc_id": 0, "filter": "none", "acc": 0.0}]
    engine.write_samples(tmp_path / "a.gz", {"t": rows})
    engine.write_samples(tmp_path / "b.gz", {"t": rows[::-1]})
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    with gzip.open(tmp_path / "a.gz", "rt") as stream:
        lines = [json.loads(line) for line in stream]
    assert [(line["task"], line["doc_id"]) for line in lines] == [("t", 0), ("t", 1)]
