"""Requests to a vLLM engine as scoring makes them: their parameters, their answers, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from reproval.requests import Answer, PlannedRequest, Read, T

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm import LLM, RequestOutput
    from vllm.logprobs import FlatLogprobs
    from vllm.lora.request import LoRARequest

ADD_AT_ONCE = 256
"""Requests added between two steps of the engine, so that it does not wait for a whole window."""
_names = count()


@dataclass(slots=True, eq=False)
class Job:
    """One request to the engine. `finish` takes its output and may give one more job.

    `blocks` is what it may fill of the KV cache, where that has to be counted.
    """

    prompt: list[int]
    params: SamplingParams
    finish: Callable[[Any], Job | None]
    blocks: int = 0


class Progress:
    """Counts finished lm-eval requests, for a callback or for a bar."""

    def __init__(self, total: int, callback: Callable[[int, int], None] | None, quiet: bool, title: str) -> None:
        self.done, self.total, self._callback = 0, total, callback
        self._bar = tqdm(total=total, disable=quiet or callback is not None, desc=title)

    def add(self, number: int = 1) -> None:
        self.done += number
        self._bar.update(number)
        if self._callback is not None and number:
            self._callback(self.done, self.total)

    def close(self) -> None:
        self._bar.close()


def ahead(items: Iterator[T]) -> Iterator[T | None]:
    """The same items, each made in a thread while the one before it is used; None while the next is not ready."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while True:
            wait((coming,), timeout=0.001)
            if not coming.done():
                yield None
                continue
            item = coming.result()
            if item is None:
                return
            coming = pool.submit(next, items, None)
            yield item


def run_jobs(
    model: LLM,
    jobs: Iterator[Job | None],
    at_once: int,
    after_step: Callable[[], None],
    lora_request: LoRARequest | None = None,
) -> None:
    """Run all jobs, at most `at_once` in the engine; each is finished as it comes back.

    Jobs are taken from the iterator while the engine works, so that it is not idle between windows. None stands
    for a job that is not ready yet.
    """
    engine = model.llm_engine
    running: dict[str, Job] = {}
    first: list[Job] = []  # To be submitted before anything else.
    room = max((engine.vllm_config.cache_config.num_gpu_blocks or 0) - 2, 1)
    try:
        more = True
        while more or running or first:
            for _ in range(min(at_once - len(running), ADD_AT_ONCE)):
                try:
                    job = first.pop() if first else next(jobs)
                except StopIteration:
                    more = False
                    break
                if job is None:
                    break
                if running and job.blocks > room:
                    first.append(job)
                    break
                name = f"reproval-{next(_names)}"
                engine.add_request(name, tokens_input(job.prompt), job.params, lora_request=lora_request)
                running[name] = job
                room -= job.blocks
            if not running:
                continue
            for output in engine.step():
                if output.finished:
                    job = running.pop(output.request_id)
                    room += job.blocks
                    if (again := job.finish(output)) is not None:
                        first.append(again)
            after_step()
    finally:
        if running:
            engine.abort_request(list(running))
        after_step()


def by_token_ids(request: PlannedRequest, read: Read | None) -> bool:
    return read == "token_ids" or (read == "mixed" and bool(request.others))


def sampling_params(request: PlannedRequest, read: Read | None, greedy: bool, fresh: bool) -> SamplingParams:
    """`fresh`: leave the prefix cache unread, so that every prompt row is computed."""
    rows: dict[str, Any] = {}
    if request.rows and by_token_ids(request, read):
        rows = {"prompt_logprob_token_ids": request.row_ids(), "prompt_logprob_start": request.start}
    elif request.rows:
        rows = {"prompt_logprobs": int(greedy)}
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        flat_logprobs=True,
        logprob_token_ids=request.final or None,
        skip_reading_prefix_cache=fresh,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        **rows,
    )


def read_answer(request: PlannedRequest, output: RequestOutput, read: Read | None, greedy: bool) -> Answer | None:
    """The values of an output; None if prompt rows that were asked for were not computed."""
    values: NDArray[np.float64] = np.empty((0, 1))
    tops = None
    if request.rows and by_token_ids(request, read):
        if output.prompt_token_id_logprobs is None:
            return None
        values = output.prompt_token_id_logprobs.astype(np.float64)
    elif request.rows:
        width = 1 + int(greedy)
        flat = cast("FlatLogprobs", output.prompt_logprobs)
        begin = len(flat.logprobs) - request.rows * width
        # V1 gives all rows, those before the hit unwritten; V2 gives only those that it computed.
        if begin < 0 or (output.num_cached_tokens or 0) > request.start:
            return None
        if flat.token_ids[begin::width] != request.prompt[request.start + 1 :].tolist():
            return None
        table = np.array(flat.logprobs[begin:]).reshape(request.rows, width)
        values, tops = table[:, :1], table[:, -1] if greedy else None
    final = cast("FlatLogprobs", output.outputs[0].logprobs).logprobs if request.final else [0.0]
    return Answer(values, tops, final[1:], final[0])
