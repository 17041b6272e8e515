"""An engine without a prefix cache: nothing is shared, and nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from demo_project import started

if TYPE_CHECKING:
    from reproval.scoring import ReprovalVLLM

pytestmark = pytest.mark.engine


@pytest.fixture
def model() -> Iterator[ReprovalVLLM]:
    with started(enable_prefix_caching=False, submit_batch=2048) as lm:
        yield lm


def test_requests_run_together_and_equal_stock(model: ReprovalVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance

    endings = [" is one of", " is two of those", " is one of these"]
    requests = [
        Instance("loglikelihood", {}, (f"The number {n}", ending), n, ("numbers", n, 1))
        for n in range(8)
        for ending in endings
    ]
    engine = model.model.llm_engine
    step, running = engine.step, []

    def watched() -> Any:
        running.append(engine.get_num_unfinished_requests())
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", watched)
        ours = model.loglikelihood(requests, disable_tqdm=True)
    assert max(running) >= 16
    model.scoring = "stock"
    stock = model.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in stock], abs=1e-4)
    assert [flag for _, flag in ours] == [flag for _, flag in stock]
    assert model.paths["numbers"].second_pass == 0
