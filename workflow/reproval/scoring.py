"""An lm-eval model on vLLM that computes the log-probabilities that are read, and no others.

`ReprovalVLLM` is lm-eval's own vLLM model with other requests: the tokens that are scored, the text that is encoded
and the results are the same. docs/scoring.md tells how. lm_eval_plugin.py makes it known to lm-eval.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, postprocess_generated_text
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from reproval.encoding import TEXTS_AT_ONCE, as_tokens, encode_pairs, encode_texts
from reproval.engine_requests import Job, Progress, ahead, read_answer, run_jobs, sampling_params
from reproval.records import ScoringPath
from reproval.request_cache import RequestCache, request_digest
from reproval.requests import (
    FINAL,
    MAX_FINAL_IDS,
    Pending,
    PlannedRequest,
    Read,
    Span,
    Tokens,
    arrange,
    computed_tokens,
    cut_left,
    plan,
    sort_key,
    whole_request,
    windows,
)

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from vllm import RequestOutput

Scoring = Literal["auto", "token_ids", "prompt_logprobs", "stock"]
Result = tuple[float, bool | None]

DEFAULT_SUBMIT_BATCH = 2048
FEW_TOKENS = 64
"""Computed tokens per request up to which logits for all of them cost less than a pass over the output weights.

A pass costs 2 bytes x vocabulary x hidden size of memory traffic and a dozen kernel launches: 0.2 to 0.6 ms from 0.1B
to 32B. Logits of one more token cost 2 to 6 microseconds, most of it on the host (docs/scoring.md).
"""
GREEDY_TEMPERATURE = 1e-5
"""vLLM's own limit below which sampling is greedy."""


class _Item(NamedTuple):
    """One span of tokens to score for lm-eval: where its result goes, and what it is called in lm-eval's own cache.

    Of the windows of one text, only the last is counted as a request.
    """

    position: int
    task: str
    name: tuple[str, str] | None
    span: Span
    cut: bool
    counted: bool = True


class _Prompt(NamedTuple):
    """One request for generated text, and what lm-eval's own cache calls it: its context and `shown`."""

    position: int
    task: str
    context: str
    tokens: Tokens
    cut: bool
    shown: dict[str, Any]
    params: SamplingParams

    @property
    def sampled(self) -> bool:
        return bool(self.params.temperature >= GREEDY_TEMPERATURE)


@dataclass(slots=True, eq=False)
class _Wanted:
    """A span that is being scored, and the items that wait for it."""

    pending: Pending
    digest: bytes
    items: list[_Item]
    again: bool = False


@register_model("reproval-vllm")
class ReprovalVLLM(VLLM):  # type: ignore[misc]
    """lm-eval's vLLM model, at the cost that loglikelihood should have.

    Beside the arguments of the stock model:

    submit_batch: most requests in the engine at once, and lm-eval requests planned at once; bounds host memory.
    request_cache, cache_key: folder and key of answers kept on disk as they come, so that an interrupted evaluation
        goes on where it was. The key must name everything that decides an answer besides the request.
    on_progress: called with (done, total) lm-eval requests of the call in hand.
    scoring: "auto"; "token_ids" or "prompt_logprobs" to fix how rows of rolling texts are read; "stock" for lm-eval's
        own code.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        submit_batch: int = DEFAULT_SUBMIT_BATCH,
        request_cache: Path | str | None = None,
        cache_key: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        scoring: Scoring = "auto",
        **engine: Any,
    ) -> None:
        """Start the engine. Raises ValueError for arguments that do not go together."""
        if (request_cache is None) != (cache_key is None):
            raise ValueError(
                "request_cache and cache_key go together: without a key, kept answers could be another model's"
            )
        if int(submit_batch) < 1:
            raise ValueError(f"submit_batch is {submit_batch}; expected a number of requests, at least 1")
        if scoring not in get_args(Scoring):
            raise ValueError(f"scoring is {scoring!r}; expected one of {', '.join(get_args(Scoring))}")
        super().__init__(pretrained, **engine)
        # lm-eval's command turns the tokenizer's threads off; one thread would take longer than the engine.
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        self.submit_batch = int(submit_batch)
        self.on_progress = on_progress
        self.scoring: Scoring = scoring if self.data_parallel_size <= 1 else "stock"
        self.request_cache = None if cache_key is None else RequestCache(Path(str(request_cache)), cache_key)
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._stock_tasks: list[str] = []

    # --- what the engine takes ---------------------------------------------------------------------------------------

    @property
    def _engine_config(self) -> Any:
        return self.model.llm_engine.vllm_config

    @property
    def _v2(self) -> bool:
        return bool(self._engine_config.use_v2_model_runner)

    @property
    def _block_size(self) -> int:
        """Tokens in a block of the prefix cache; 0 without prefix caching."""
        cache = self._engine_config.cache_config
        return int(cache.block_size) if cache.enable_prefix_caching else 0

    def _read(self, greedy: bool, tokens: float) -> Read | None:
        """How to read prompt rows of requests for which so many tokens have to be computed on average.

        None where only lm-eval's own request is sure to be right.
        """
        config = self._engine_config
        model = config.model_config
        if (
            model.logprobs_mode != "raw_logprobs"
            or config.speculative_config is not None
            or model.is_diffusion
            or config.cache_config.kv_sharing_fast_prefill
        ):
            return None
        if self._v2:
            if greedy:
                return "prompt_logprobs"
            if self.scoring == "prompt_logprobs":
                return "mixed"
            return "token_ids" if self.scoring == "token_ids" or tokens > FEW_TOKENS else "mixed"
        # The V1 runner leaves rows before a prefix hit unwritten. Where the hit ended is known, unless the request was
        # preempted and went on from another one. `_run` prevents that by counting KV blocks, which it can do only
        # where every layer keeps every token.
        layers = set(getattr(model.hf_text_config, "layer_types", None) or ())
        uniform = not model.is_hybrid and len(layers) <= 1 and model.get_sliding_window() is None
        return "prompt_logprobs" if uniform else None

    # --- counting ----------------------------------------------------------------------------------------------------

    @property
    def paths(self) -> dict[str, ScoringPath]:
        """By leaf task: how its requests were scored since the start or `reset_paths`."""
        return {task: ScoringPath(**counts) for task, counts in self._counts.items()}

    def reset_paths(self) -> None:
        self._counts.clear()

    def _run(self, jobs: Iterator[Job | None]) -> None:
        keep = self.request_cache.flush if self.request_cache is not None else lambda: None
        run_jobs(self.model, jobs, self.submit_batch, keep, self.lora_request)

    # --- loglikelihood -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Result]:
        """(sum of log-probabilities, is_greedy) for each request's continuation."""
        if self.scoring == "stock" or self.enable_thinking:
            self._stock_tasks = [request.task_name or "" for request in requests]
            stock = cast("list[Result]", super().loglikelihood(requests, disable_tqdm=disable_tqdm))
            for request, (value, _) in zip(requests, stock, strict=True):
                self._counts[request.task_name or ""]["not_a_number"] += math.isnan(value)
            return stock

        def encode(window: list[tuple[int, Instance]]) -> list[_Item]:
            encoded = encode_pairs(self, [request.args for _, request in window])
            return [
                _Item(position, request.task_name or "", request.args, *cut_left(*pair, self.max_length - 1))
                for (position, request), pair in zip(window, encoded, strict=True)
            ]

        numbered = windows(enumerate(requests), self.submit_batch)
        return self._score(ahead(map(encode, numbered)), len(requests), disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Result]:
        if self.scoring != "stock":
            items = (
                _Item(position, "", name, *cut_left(as_tokens(context), as_tokens(continuation), self.max_length - 1))
                for position, (name, context, continuation) in enumerate(requests)
            )
            return self._score(windows(items, self.submit_batch), len(requests), disable_tqdm)
        for task, (_, context, continuation) in zip(self._stock_tasks, requests, strict=False):
            self._counts[task].update(requests=1, stock=1)
            self._counts[task]["cut"] += len(context) + len(continuation) > self.max_length - 1
        self._stock_tasks = []
        return cast("list[Result]", super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm))

    def _score(
        self, item_windows: Iterator[list[_Item] | None], total: int, quiet: bool, greedy: bool = True
    ) -> list[Result]:
        """Results of all items, by position. Without `greedy` the second part of a result may be None."""
        kind = "loglikelihood" if greedy else "loglikelihood_rolling"
        if self._block_size:
            # What earlier calls left in the prefix cache could hide rows that are wanted now.
            self.model.reset_prefix_cache()
        progress = Progress(total, self.on_progress, quiet or self.rank != 0, "Running loglikelihood requests")
        results: dict[int, Result] = {}
        answered: dict[bytes, Result] = {}

        def give(item: _Item, result: Result) -> None:
            results[item.position] = result
            self._counts[item.task]["not_a_number"] += item.counted * math.isnan(result[0])
            if item.name is not None:
                self.cache_hook.add_partial("loglikelihood", item.name, result)
            progress.add(item.counted)

        def done(wanted: _Wanted) -> None:
            result = wanted.pending.result()
            answered[wanted.digest] = result
            if self.request_cache is not None:
                self.request_cache.put(wanted.digest, list(result))
            for item in wanted.items:
                give(item, result)

        def jobs() -> Iterator[Job | None]:
            waiting: dict[bytes, _Wanted] = {}
            for window in item_windows:
                if window is None:
                    yield None
                    continue
                spans: dict[bytes, Span] = {}
                waiting = {key: wanted for key, wanted in waiting.items() if wanted.pending.missing}
                for item in window:
                    span = item.span
                    scored = len(span.tokens) - span.first
                    counts = self._counts[item.task]
                    counts.update(requests=item.counted, cut=item.cut and item.counted)
                    if not scored:
                        give(item, (0, True))
                        continue
                    if not span.first:
                        raise ValueError(
                            f"task {item.task}: a continuation has no token before it to condition on; its context is "
                            f"empty or max_model_len={self.max_length} is too short for it ({scored} tokens scored)"
                        )
                    digest = self._digest(kind, span.first.to_bytes(4, "little"), span.tokens.tobytes())
                    if digest in answered:
                        counts["duplicates"] += item.counted
                        give(item, answered[digest])
                    elif digest in waiting:
                        counts["duplicates"] += item.counted
                        waiting[digest].items.append(item)
                    elif (kept := self._kept(digest)) is not None:
                        counts["cached"] += item.counted
                        answered[digest] = (kept[0], kept[1])
                        give(item, answered[digest])
                    else:
                        waiting[digest] = _Wanted(Pending.of(span), digest, [item])
                        spans[digest] = span
                yield from self._jobs(spans, waiting, greedy, done)

        try:
            self._run(jobs())
        finally:
            progress.close()
        return [results[position] for position in range(len(results))]

    def _digest(self, kind: str, *parts: bytes) -> bytes:
        return request_digest(kind, *parts) if self.request_cache is None else self.request_cache.digest(kind, *parts)

    def _kept(self, digest: bytes) -> Any:
        return None if self.request_cache is None else self.request_cache.get(digest)

    def _jobs(
        self,
        spans: dict[bytes, Span],
        waiting: dict[bytes, _Wanted],
        greedy: bool,
        done: Callable[[_Wanted], None],
    ) -> Iterator[Job]:
        """Engine requests for the spans of one window."""
        arranged = arrange(spans)
        read = self._read(greedy, computed_tokens(spans, arranged, self._block_size))
        if read is None:
            requests = [whole_request(key, spans[key]) for key, _ in arranged]
            suffix = set(spans)
        else:
            most = self._engine_config.model_config.max_logprobs
            requests = plan(spans, arranged, read, self._block_size, MAX_FINAL_IDS if most < 0 else most)
            suffix = {part.span for request in requests for part in request.slices if part.row != FINAL}
        for key in spans:
            path = "one_token" if key not in suffix else "suffix" if read else "stock"
            item = waiting[key].items[0]
            self._counts[item.task][path] += item.counted

        def job(request: PlannedRequest, fresh: bool) -> Job:
            def finish(output: RequestOutput) -> Job | None:
                answer = read_answer(request, output, read, greedy)
                if answer is None:
                    if fresh:
                        raise RuntimeError("vLLM gave no log-probabilities for a request that read no prefix cache")
                    for part in request.slices:
                        wanted = waiting[part.span]
                        self._counts[wanted.items[0].task]["second_pass"] += not wanted.again
                        wanted.again = True
                    return job(request, fresh=True)
                for part in request.slices:
                    wanted = waiting[part.span]
                    wanted.pending.fill(request, part, answer)
                    if not wanted.pending.missing:
                        done(wanted)
                return None

            params = sampling_params(request, read, greedy, fresh)
            counted = self._block_size and read is not None and not self._v2
            blocks = len(request.prompt) // self._block_size + 1 if counted else 0
            return Job(request.prompt.tolist(), params, finish, blocks)

        for request in requests:
            yield job(request, fresh=read is None)

    # --- rolling loglikelihood ---------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sum of log-probabilities of each whole text, in lm-eval's disjoint windows."""
        if self.scoring == "stock":
            for request in requests:
                self._counts[request.task_name or ""].update(requests=1, stock=1)
            return cast("list[float]", super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))
        owners: list[int] = []

        def encoded() -> Iterator[tuple[int, Instance, list[int]]]:
            for window in windows(enumerate(requests), TEXTS_AT_ONCE):
                tokens = encode_texts(self, (request.args[0] for _, request in window))
                yield from ((index, request, tokens[request.args[0]]) for index, request in window)

        def items() -> Iterator[_Item]:
            for index, request, tokens in encoded():
                rolling = get_rolling_token_windows(
                    token_list=tokens,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 2,  # One token of context, one for generation.
                    context_len=1,
                )
                pairs = [make_disjoint_window(pair) for pair in rolling] or [([], [])]
                for number, (context, continuation) in enumerate(pairs, 1):
                    owners.append(index)
                    span, cut = cut_left(as_tokens(context), as_tokens(continuation), self.max_length - 1)
                    last = number == len(pairs)
                    yield _Item(len(owners) - 1, request.task_name or "", None, span, cut, last)

        rolled = ahead(windows(items(), self.submit_batch))
        results = self._score(rolled, len(requests), disable_tqdm, greedy=False)
        sums: list[float] = [0] * len(requests)
        for index, (value, _) in zip(owners, results, strict=True):
            sums[index] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), value)
        return sums

    # --- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated text of each request. Equal requests are generated once where sampling is greedy."""
        eos = self.tokenizer.decode(self.eot_token_id) or getattr(self.tokenizer, "eos_token", None) or ""

        def encode(window: list[tuple[int, Instance]]) -> list[_Prompt]:
            contexts = self.tok_encode([request.args[0] for _, request in window])
            return [
                self._prompt(position, request, context, eos)
                for (position, request), context in zip(window, contexts, strict=True)
            ]

        numbered = map(encode, windows(enumerate(requests), self.submit_batch))
        if self.scoring == "stock":
            for prompt in chain.from_iterable(numbered):
                self._counts[prompt.task].update(requests=1, stock=1, cut=int(prompt.cut), sampled=int(prompt.sampled))
            return cast("list[str]", super().generate_until(requests, disable_tqdm=disable_tqdm))
        progress = Progress(
            len(requests), self.on_progress, disable_tqdm or self.rank != 0, "Running generate_until requests"
        )
        texts: dict[int, str] = {}
        answered: dict[bytes, tuple[str, bool]] = {}  # the text, and whether only its length ended it
        seen: Counter[bytes] = Counter()
        waiting: dict[bytes, list[_Prompt]] = {}

        def give(prompt: _Prompt, raw: str, by_length: bool) -> None:
            text = postprocess_generated_text(raw, prompt.shown["until"], self.think_end_token)
            texts[prompt.position] = text
            self._counts[prompt.task]["ended_by_length"] += by_length
            self.cache_hook.add_partial("generate_until", (prompt.context, prompt.shown), text)
            progress.add()

        def job(digest: bytes, prompt: _Prompt) -> Job:
            def finish(output: RequestOutput) -> None:
                (answer,) = output.outputs
                answered[digest] = answer.text, answer.finish_reason == "length"
                if self.request_cache is not None:
                    self.request_cache.put(digest, list(answered[digest]))
                for each in waiting.pop(digest):
                    give(each, *answered[digest])

            return Job(prompt.tokens.tolist(), prompt.params, finish)

        def jobs() -> Iterator[Job | None]:
            for window in ahead(numbered):
                if window is None:
                    yield None
                    continue
                new: list[tuple[bytes, _Prompt]] = []
                for prompt in window:
                    counts = self._counts[prompt.task]
                    counts.update(requests=1, cut=int(prompt.cut), sampled=int(prompt.sampled))
                    told = json.dumps(prompt.shown | {"stop": prompt.params.stop}, sort_keys=True, default=repr)
                    digest = self._digest("generated", prompt.tokens.tobytes(), told.encode())
                    if prompt.sampled:
                        # Every draw is a request of its own; a kept one stands for the draw of the same number.
                        seen[digest] += 1
                        digest = self._digest("draw", digest, seen[digest].to_bytes(8, "little"))
                    if digest in answered:
                        counts["duplicates"] += 1
                        give(prompt, *answered[digest])
                    elif digest in waiting:
                        counts["duplicates"] += 1
                        waiting[digest].append(prompt)
                    elif (kept := self._kept(digest)) is not None:
                        counts["cached"] += 1
                        answered[digest] = (kept[0], kept[1])
                        give(prompt, *answered[digest])
                    else:
                        counts["stock"] += 1
                        waiting[digest] = [prompt]
                        new.append((digest, prompt))
                # Prompts that begin alike meet in the prefix cache.
                for digest, prompt in sorted(new, key=lambda pair: sort_key(pair[1].tokens)):
                    yield job(digest, prompt)

        try:
            self._run(jobs())
        finally:
            progress.close()
        return [texts[position] for position in range(len(requests))]

    def _prompt(self, position: int, request: Instance, context: list[int], eos: str) -> _Prompt:
        """A request of `generate_until`, cut and with the parameters that lm-eval's model gives it."""
        kwargs, until, max_gen_toks = self.modify_gen_kwargs(
            request.args[1], eos=eos, default_max_gen_toks=self.max_gen_toks
        )
        tokens, max_gen_toks = maybe_truncate(
            context,
            max_gen_toks=max_gen_toks,
            max_model_len=self.max_length,
            side=self.truncation_side,
            verbose=False,
        )
        # With a thinking model, only EOS stops the engine: the task's own stops may occur in the thoughts.
        stop = [text for text in until if text == eos] if self.think_end_token else until
        params = SamplingParams(max_tokens=max_gen_toks, stop=stop, output_kind=RequestOutputKind.FINAL_ONLY, **kwargs)
        shown = kwargs | {"until": until, "max_gen_toks": max_gen_toks}
        # By the lengths: where an answer leaves no room for a prompt, lm-eval may keep as many tokens as there were.
        cut = len(context) + max_gen_toks > self.max_length
        return _Prompt(position, request.task_name or "", request.args[0], as_tokens(tokens), cut, shown, params)
