"""Planning of scoring requests and the cache of finished ones: the parts that need no engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reproval.request_cache import RequestCache, RequestCacheError
from reproval.requests import (
    FINAL,
    Answer,
    Pending,
    PlannedRequest,
    Read,
    Slice,
    Span,
    arrange,
    computed_tokens,
    cut_left,
    plan,
    whole_request,
    windows,
)

BLOCK = 4


def span(context: list[int], continuation: list[int]) -> Span:
    return Span(np.array(context + continuation, dtype=np.int32), len(context))


def truth(prefix: list[int], token: int) -> float:
    """Stands for the model: a log-probability that only this prefix and this token have."""
    return -1.0 - hash((tuple(prefix), token)) % 1_000_003 / 1_000_003


class Engine:
    """Answers requests in order with a prefix cache of whole blocks, as vLLM does (kv_cache_manager.py)."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.cached: set[tuple[int, ...]] = set()

    def answer(self, request: PlannedRequest, read: Read) -> Answer | None:
        prompt = request.prompt.tolist()
        hit = 0
        while self.block and hit + self.block < len(prompt) and tuple(prompt[: hit + self.block]) in self.cached:
            hit += self.block
        if self.block:
            self.cached |= {tuple(prompt[:end]) for end in range(self.block, len(prompt) + 1, self.block)}
        if request.rows and hit > request.start:
            return None
        ids = request.row_ids()
        if read == "prompt_logprobs":
            assert ids.shape[1] <= 1
        rows = np.array(
            [
                [truth(prompt[: request.start + row + 1], int(t)) if t >= 0 else -np.inf for t in r]
                for row, r in enumerate(ids)
            ]
        ).reshape(ids.shape)
        final = [truth(prompt, token) for token in request.final]
        return Answer(rows, None, final, 0.0)


def solve(spans: dict[int, Span], read: Read, block: int, width: int = 20) -> tuple[dict[int, float], int]:
    """Results of all spans, and how many requests it took."""
    requests = plan(spans, arrange(spans), read, block, width)
    engine = Engine(block)
    pending = {index: Pending.of(one) for index, one in spans.items()}
    for request in requests:
        for ids in (request.final, *request.others.values()):
            assert len(set(ids)) == len(ids), "asked twice"
        assert request.row_ids().shape[1] <= width, "more ids of a row than the engine gives"
        answer = engine.answer(request, read)
        assert answer is not None, "a prefix hit reached past a row that was wanted"
        for part in request.slices:
            pending[part.span].fill(request, part, answer)
    assert all(one.missing == 0 for one in pending.values())
    return {index: one.result()[0] for index, one in pending.items()}, len(requests)


def expected(one: Span) -> float:
    tokens = one.tokens.tolist()
    return sum(truth(tokens[:index], tokens[index]) for index in range(one.first, len(tokens)))


small = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@settings(max_examples=400, deadline=None)
@given(
    pairs=st.lists(st.tuples(small, small), min_size=1, max_size=12),
    read=st.sampled_from(["token_ids", "mixed", "prompt_logprobs"]),
    block=st.sampled_from([0, 1, 4]),
    width=st.sampled_from([1, 2, 20]),
)
@example(pairs=[([1] * 4, [2, 2]), ([1] * 4, [0, 2])], read="prompt_logprobs", block=4, width=20)
@example(pairs=[([1] * 3, [2, 2, 1, 1]), ([1] * 3, [2, 2, 0, 0])], read="token_ids", block=4, width=20)
def test_every_span_gets_its_value_in_one_pass(
    pairs: list[tuple[list[int], list[int]]], read: Read, block: int, width: int
) -> None:
    spans = {index: span(*pair) for index, pair in enumerate(pairs)}
    results, _ = solve(spans, read, block, width)
    for index, one in spans.items():
        assert results[index] == pytest.approx(expected(one), abs=1e-9)


@pytest.mark.parametrize("read", ["token_ids", "mixed", "prompt_logprobs"])
def test_choices_of_one_token_are_one_request_without_prompt_rows(read: Read) -> None:
    spans = {index: span([1, 2, 3], [letter]) for index, letter in enumerate([7, 8, 9, 10])}
    requests = plan(spans, arrange(spans), read, BLOCK, 20)
    assert len(requests) == 1
    assert requests[0].rows == 0
    assert sorted(requests[0].final) == [7, 8, 9, 10]
    assert all(part.row == FINAL for part in requests[0].slices)


def test_long_choices_are_one_request_each_even_at_a_block_boundary() -> None:
    spans = {index: span([1] * BLOCK, [letter, 3, 4, 5]) for index, letter in enumerate([7, 8, 9, 10])}
    assert solve(spans, "token_ids", BLOCK)[1] == 4
    assert solve(spans, "mixed", BLOCK)[1] == 4
    # With prompt_logprobs one more request gives all first tokens at the boundary.
    assert solve(spans, "prompt_logprobs", BLOCK)[1] == 5
    # Beside a boundary, and without a prefix cache, each has its own row before the parting.
    beside = {index: span([1] * (BLOCK + 1), one.tokens.tolist()[BLOCK:]) for index, one in spans.items()}
    assert solve(beside, "prompt_logprobs", BLOCK)[1] == 4
    assert solve(spans, "prompt_logprobs", 0)[1] == 4
    assert solve(beside, "token_ids", BLOCK, width=1)[1] == 4


def test_only_requests_at_a_block_boundary_answer_for_others_when_mixed() -> None:
    for context, answering in ([1] * BLOCK, 1), ([1] * (BLOCK + 1), 0):
        spans = {index: span(context, [letter, 3, 4, 5]) for index, letter in enumerate([7, 8, 9, 10])}
        requests = plan(spans, arrange(spans), "mixed", BLOCK, 20)
        assert sum(bool(request.others) for request in requests) == answering


def test_computed_tokens_leaves_out_what_the_cache_gives() -> None:
    spans = {index: span([1] * 10, [letter, 3, 4]) for index, letter in enumerate([7, 8])}
    # Prompts of 12 tokens; the second finds two blocks of 4.
    assert computed_tokens(spans, arrange(spans), 4) == (12 + 4) / 2
    assert computed_tokens(spans, arrange(spans), 0) == 12
    # Choices of one token are one request.
    letters = {index: span([1] * 10, [letter]) for index, letter in enumerate([7, 8, 9, 10])}
    assert computed_tokens(letters, arrange(letters), 1) == 10


def test_a_choice_that_begins_another_needs_no_request_of_its_own() -> None:
    spans = {0: span([1, 2], [5]), 1: span([1, 2], [5, 6]), 2: span([1, 2], [5, 6, 7])}
    results, number = solve(spans, "token_ids", BLOCK)
    assert number == 1
    assert results[0] == expected(spans[0])


def test_more_choices_than_the_engine_takes_at_one_position_are_split() -> None:
    spans = {index: span([1, 2, 3], [index]) for index in range(300)}
    requests = plan(spans, arrange(spans), "token_ids", BLOCK, 20)
    assert [len(request.final) for request in requests] == [128, 128, 44]
    results, _ = solve(spans, "token_ids", BLOCK)
    assert results == {index: expected(one) for index, one in spans.items()}


def test_only_rows_of_the_continuation_are_asked_for() -> None:
    spans = {0: span([1] * 500, [2, 3, 4])}
    requests = plan(spans, arrange(spans), "token_ids", 16, 20)
    assert len(requests[0].prompt) == 502
    assert requests[0].start == 499
    assert requests[0].row_ids().tolist() == [[2], [3]]
    assert requests[0].final == [4]


def test_whole_request_is_lm_evals_own() -> None:
    one = span([1, 2], [3, 4])
    request = whole_request(0, one)
    assert request.prompt.tolist() == [1, 2, 3, 4]
    pending = Pending.of(one)
    pending.fill(request, request.slices[0], Answer(np.array([[-1.0], [-2.0]]), np.array([-1.0, -0.5]), [], 0.0))
    assert pending.result() == (-3.0, False)


@pytest.mark.parametrize(
    ("values", "tops", "greedy"),
    [([-1.0, -2.0], [-1.0, -2.0], True), ([-1.0, -2.0], [-1.0, -1.9], False), ([-1.0, -2.0], None, None)],
)
def test_is_greedy_needs_every_token_on_top(values: list[float], tops: list[float] | None, greedy: bool | None) -> None:
    one = span([1], [2, 3])
    request = whole_request(0, one)
    pending = Pending.of(one)
    answer = Answer(np.array(values)[:, None], None if tops is None else np.array(tops), [], 0.0)
    pending.fill(request, request.slices[0], answer)
    assert pending.result() == (-3.0, greedy)


@pytest.mark.parametrize("order", [list, reversed])
def test_a_token_that_is_not_on_top_decides_although_others_are_unknown(
    order: Callable[[list[Slice]], Iterable[Slice]],
) -> None:
    one = span([1, 2], [3, 4])
    (request,) = plan({0: one}, arrange({0: one}), "token_ids", BLOCK, 20)
    pending = Pending.of(one)
    for part in order(request.slices):
        pending.fill(request, part, Answer(np.array([[-1.0]]), None, [-5.0], -0.1))
    assert pending.result() == (-6.0, False)
    # One that is on top does not.
    unknown = Pending.of(one)
    for part in order(request.slices):
        unknown.fill(request, part, Answer(np.array([[-1.0]]), None, [-0.1], -0.1))
    assert unknown.result() == (-1.1, None)


def test_a_single_token_that_is_the_most_likely_one_is_greedy() -> None:
    one = span([1, 2], [3])
    (request,) = plan({0: one}, arrange({0: one}), "prompt_logprobs", BLOCK, 20)
    for value, greedy in ((-0.1, True), (-0.2, False)):
        pending = Pending.of(one)
        pending.fill(request, request.slices[0], Answer(np.empty((0, 1)), None, [value], -0.1))
        assert pending.result() == (value, greedy)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ([1, 2, 3], [4, 5], ([1, 2, 3, 4, 5], 3, False)),
        ([1, 2, 3, 4], [5, 6], ([2, 3, 4, 5, 6], 3, True)),
        ([1], [2, 3, 4, 5, 6], ([2, 3, 4, 5, 6], 0, True)),
        # lm-eval's negative ctxlen: 5 - 7 = -2, so the last two tokens are scored.
        ([1], [2, 3, 4, 5, 6, 7, 8], ([4, 5, 6, 7, 8], 3, True)),
        # 1 - 8 = -7 of five tokens: all of them.
        ([1], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], ([9, 10, 11, 12, 13], 0, True)),
    ],
)
def test_cut_left_is_lm_evals(
    context: list[int], continuation: list[int], expected: tuple[list[int], int, bool]
) -> None:
    one, cut = cut_left(np.array(context, dtype=np.int32), np.array(continuation, dtype=np.int32), 5)
    assert (one.tokens.tolist(), one.first, cut) == expected


def test_windows() -> None:
    assert list(windows(range(5), 2)) == [[0, 1], [2, 3], [4]]


# --- request cache ---------------------------------------------------------------------------------------------------


def test_answers_come_back_bit_for_bit(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path, "model A")
    value = [-0.1 + 1e-17, True]
    digest = cache.digest("loglikelihood", b"tokens")
    cache.put(digest, value)
    cache.close()
    again = RequestCache(tmp_path, "model A")
    assert again.get(digest) == value
    again.close()


def test_another_key_finds_nothing_even_in_a_renamed_file(tmp_path: Path) -> None:
    first = RequestCache(tmp_path, "model A")
    first.put(first.digest("loglikelihood", b"tokens"), [-1.0, True])
    first.close()
    other = RequestCache(tmp_path, "model B")
    assert other.path != first.path
    assert other.get(other.digest("loglikelihood", b"tokens")) is None
    other.close()
    first.path.rename(other.path)
    with pytest.raises(RequestCacheError, match="first line"):
        RequestCache(tmp_path, "model B")


def test_digests_do_not_run_together(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path, "A")
    assert cache.digest("x", b"ab", b"c") != cache.digest("x", b"a", b"bc")
    assert cache.digest("loglikelihood", b"ab") != cache.digest("generate_until", b"ab")
    assert cache.digest("x", b"ab") != RequestCache(tmp_path, "B").digest("x", b"ab")


def test_an_answer_is_there_for_the_next_request_that_is_equal(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path, "A")
    cache.put(cache.digest("x", b"1"), [-1.5, True])
    assert cache.get(cache.digest("x", b"1")) == [-1.5, True]
    assert len(cache) == 1
    cache.close()


def test_answers_go_to_the_disk_every_few_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that dies may cost what was answered in the last five seconds."""
    synced: list[int] = []
    now = [0.0]
    monkeypatch.setattr(os, "fsync", lambda stream: synced.append(os.fstat(stream).st_size))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cache = RequestCache(tmp_path, "A")
    sizes = []
    for second in range(12):
        now[0] = float(second)
        cache.put(cache.digest("x", bytes([second])), second)
        cache.flush()
        sizes.append(cache.path.stat().st_size)
    assert synced == [sizes[6]]
    cache.put(cache.digest("x", b"last"), "last")
    cache.close()
    assert synced == [sizes[6], cache.path.stat().st_size]


@pytest.mark.parametrize("keep", [1, 20, 60])
def test_a_line_that_was_cut_off_is_dropped_and_the_rest_kept(tmp_path: Path, keep: int) -> None:
    cache = RequestCache(tmp_path, "A")
    digests = [cache.digest("x", bytes([number])) for number in range(3)]
    for number, digest in enumerate(digests):
        cache.put(digest, [float(number), False])
    cache.close()
    lines = cache.path.read_bytes().splitlines(keepends=True)
    cache.path.write_bytes(b"".join(lines[:-1]) + lines[-1][: min(keep, len(lines[-1]) - 1)])
    again = RequestCache(tmp_path, "A")
    assert [again.get(digest) for digest in digests] == [[0.0, False], [1.0, False], None]
    again.put(digests[2], [2.5, True])
    again.close()
    last = RequestCache(tmp_path, "A")
    assert [last.get(digest) for digest in digests] == [[0.0, False], [1.0, False], [2.5, True]]
    last.close()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path, "A")
    digest = cache.digest("x", b"1")
    cache.put(digest, [-1.25, False])
    cache.close()
    cache.path.write_bytes(cache.path.read_bytes().replace(b"-1.25", b"-1.35"))
    again = RequestCache(tmp_path, "A")
    assert again.get(digest) is None
    again.close()


def test_writers_at_the_same_time_have_files_of_their_own_and_all_of_them_count(tmp_path: Path) -> None:
    """As when a job is started again on another node while its dead predecessor's locks would still be held."""
    writers = [RequestCache(tmp_path, "A") for _ in range(3)]
    digests = [writers[0].digest("x", bytes([number])) for number in range(30)]
    for number, digest in enumerate(digests):
        writers[number % 3].put(digest, number)
        writers[number % 3].flush()
    after = RequestCache(tmp_path, "A")
    assert [after.get(digest) for digest in digests] == list(range(30))
    writers[0].put(digests[1], "later")
    for cache in writers:
        cache.close()
    assert len(list(tmp_path.iterdir())) == 3, "who answers nothing leaves no file"


def test_what_was_answered_again_counts_as_it_was_last(tmp_path: Path) -> None:
    for value in ("first", "second", "third"):
        cache = RequestCache(tmp_path, "A")
        cache.put(cache.digest("x", b"1"), value)
        cache.close()
    last = RequestCache(tmp_path, "A")
    assert last.get(last.digest("x", b"1")) == "third"


def test_a_file_whose_writer_died_at_its_first_line_holds_nothing(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path, "A")
    cache.put(cache.digest("x", b"1"), 1)
    cache.close()
    cache.path.write_bytes(cache.path.read_bytes()[:20])
    assert len(RequestCache(tmp_path, "A")) == 0


def test_flushed_answers_survive_kill(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from reproval.request_cache import RequestCache
        cache = RequestCache(Path(sys.argv[1]), "A")
        for number in range(100):
            cache.put(cache.digest("x", bytes([number])), [float(number), None])
        cache.flush()
        cache.put(cache.digest("x", b"unflushed"), "x" * 100)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, timeout=60
    )
    assert run.returncode == -signal.SIGKILL
    cache = RequestCache(tmp_path, "A")
    assert [cache.get(cache.digest("x", bytes([number]))) for number in range(100)] == [
        [float(number), None] for number in range(100)
    ]
    cache.close()
