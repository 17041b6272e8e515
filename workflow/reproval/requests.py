"""Which requests to send to the engine so that every wanted log-probability is computed once.

Pure: no engine, no tokenizer. lm-eval asks for the log-probability of a continuation after a context; here that is a
`Span` of tokens. The spans of one window form a tree of tokens: a node is a prefix, and what is wanted are
(node, next token) pairs. One engine request walks one path of the tree and can answer

- at its prompt rows, for the nodes inside its path (row r is the node of r + 1 tokens, and predicts token r + 1), and
- at its generated position, for the node at its end.

Spans that differ only in their last token, such as the choices A, B, C and D of one question, end at the same node:
one request answers them all, without prompt rows. For longer choices every node is answered by the request that
reaches it first, which is the one whose prefix-cache hit cannot reach past it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Read = Literal["token_ids", "mixed", "prompt_logprobs"]
"""How prompt rows are read.

"token_ids": a row gives any ids (vLLM's prompt_logprob_token_ids). Costs a pass over the output weights per request.
"prompt_logprobs": a row gives the prompt's own next token, and the most likely one if wanted. Costs logits for every
token that is computed.
"mixed": the second, and the first for requests that answer for others at a block boundary.
"""
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

FINAL = -1
"""In place of a prompt row: the generated position."""

MAX_FINAL_IDS = 128
"""vLLM's MAX_LOGPROB_TOKEN_IDS: most ids that one request may score at the generated position."""


class Span(NamedTuple):
    """`tokens[first:]`, to be scored one by one, each given all tokens before it."""

    tokens: Tokens
    first: int


class Slice(NamedTuple):
    """Values of a request that belong to a span: `length` rows from the prompt row `row` on, in one column.

    They are the span's values from `at` on. `row` is FINAL for the generated position (`length` is then 1).
    """

    span: Any
    at: int
    row: int
    length: int
    column: int


@dataclass(slots=True, eq=False)
class PlannedRequest:
    """One engine request.

    `start` is the first prompt row that is wanted; len(prompt) - 1 if none is (the last row is the generated
    position). Column 0 of a row is the prompt's own next token; `others` are further ids of a row, by row. `final`
    are the ids at the generated position.
    """

    prompt: Tokens
    start: int
    final: list[int]
    others: dict[int, list[int]] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return max(len(self.prompt) - 1 - self.start, 0)

    def row_ids(self) -> Tokens:
        """Ids to score, [rows, widest row], padded with -1."""
        width = 1 + max(map(len, self.others.values()), default=0)
        ids = np.full((self.rows, width), -1, dtype=np.int32)
        ids[:, 0] = self.prompt[self.start + 1 :]
        for row, others in self.others.items():
            ids[row - self.start, 1 : 1 + len(others)] = others
        return ids


class _Place(NamedTuple):
    """Where a (node, token) pair is answered."""

    request: PlannedRequest
    row: int
    column: int


@dataclass(slots=True, eq=False)
class _Segment:
    """Nodes of `begin` to `end` tokens, both included, that `request` reached first on the path in hand."""

    request: PlannedRequest
    begin: int
    end: int


def cut_left(context: Tokens, continuation: Tokens, limit: int) -> tuple[Span, bool]:
    """The span of a request, and whether it was cut, as lm-eval's vLLM model cuts an over-long one.

    It keeps the last `limit` tokens. When not even the continuation fits, lm-eval 0.4.13 scores only as many tokens
    from the end as were cut from the continuation (its `ctxlen` turns negative); the same is done here, so that the
    numbers stay the same.
    """
    total = len(context) + len(continuation)
    tokens = np.concatenate([context, continuation])[-limit:]
    first = len(context) - max(0, total - limit)
    if first < 0:
        first = max(0, len(tokens) + first)
    return Span(tokens, first), total > limit


def common_prefix(left: Tokens, right: Tokens) -> int:
    """Number of leading tokens that are equal."""
    shorter = min(len(left), len(right))
    unequal = left[:shorter] != right[:shorter]
    return int(unequal.argmax()) if unequal.any() else shorter


def sort_key(tokens: Tokens) -> bytes:
    """Bytes that sort as the tokens do."""
    return tokens.astype(">i4").tobytes()


def whole_request(index: Hashable, span: Span) -> PlannedRequest:
    """lm-eval's own request for a span: the whole text as prompt."""
    start = span.first - 1
    request = PlannedRequest(span.tokens, start, [])
    request.slices.append(Slice(index, 0, start, request.rows, 0))
    return request


def arrange(spans: Mapping[K, Span]) -> list[tuple[K, int]]:
    """The spans in the order in which to ask for them, each with the tokens that its prompt shares with earlier ones.

    Sorted by prompt (all tokens but the last), so that the prompt before a prompt shares most with it. Longest first
    among prompts that begin alike, so that a short one needs no request of its own.
    """
    order = sorted(spans, key=lambda key: sort_key(spans[key].tokens[:-1]), reverse=True)
    arranged = []
    previous: Tokens = np.empty(0, dtype=np.int32)
    for key in order:
        prompt = spans[key].tokens[:-1]
        arranged.append((key, common_prefix(previous, prompt)))
        previous = prompt
    return arranged


def computed_tokens(spans: Mapping[K, Span], arranged: Sequence[tuple[K, int]], block_size: int) -> float:
    """Tokens that the engine has to compute for a request, on average, once shared blocks come from the cache."""
    new = [
        len(spans[key].tokens) - 1 - (shared - shared % block_size if block_size else 0)
        for key, shared in arranged
        if shared < len(spans[key].tokens) - 1
    ]
    return sum(new) / len(new) if new else 0.0


def plan(
    spans: Mapping[K, Span], arranged: Sequence[tuple[K, int]], read: Read, block_size: int, row_width: int
) -> list[PlannedRequest]:
    """Requests that answer every span, in the order in which they should be sent.

    `row_width` is the most ids that one row can give. `block_size` is the prefix cache's, 0 without one: a request
    whose path leaves an earlier one at a multiple of it may find the branching row already cached, and then the row
    is not computed again.
    """
    requests: list[PlannedRequest] = []
    # Answers at nodes where paths part, by request that reached the node first and number of tokens.
    places: dict[tuple[int, int], dict[int, _Place]] = {}
    extra: dict[tuple[int, int], PlannedRequest] = {}
    stack: list[_Segment] = []

    def at_end(owner: PlannedRequest, depth: int, token: int) -> _Place:
        """Answer at the generated position: of the owner if it ends here, else of a request made for this node."""
        for request in (owner if len(owner.prompt) == depth else None, extra.get((id(owner), depth))):
            if request is not None and len(request.final) < MAX_FINAL_IDS:
                break
        else:
            request = extra[id(owner), depth] = PlannedRequest(owner.prompt[:depth], depth - 1, [])
            requests.append(request)
        request.final.append(token)
        return _Place(request, FINAL, len(request.final) - 1)

    def place(owner: PlannedRequest, depth: int, token: int, own: PlannedRequest | None, branch: int) -> _Place:
        known = places.setdefault((id(owner), depth), {})
        if token in known:
            return known[token]
        row = depth - 1
        own_row = own is not None and depth == branch and (block_size == 0 or depth % block_size != 0)
        others = owner.others.get(row, [])
        if depth == len(owner.prompt):
            found = at_end(owner, depth, token)
        elif token == owner.prompt[depth]:
            found = _Place(owner, row, 0)
        elif own is not None and own_row and read != "token_ids":
            found = _Place(own, row, 0)
        elif read != "prompt_logprobs" and len(others) + 1 < row_width:
            others.append(token)
            owner.others[row] = others
            found = _Place(owner, row, len(others))
        elif own is not None and own_row:
            found = _Place(own, row, 0)
        else:
            found = at_end(owner, depth, token)
        known[token] = found
        return found

    def want(index: K, at: int, found: _Place, length: int = 1) -> None:
        request, row, column = found
        if row != FINAL:
            request.start = min(request.start, row)
        request.slices.append(Slice(index, at, row, length, column))

    for index, shared in arranged:
        tokens, first = spans[index]
        prompt = tokens[:-1]
        while stack and stack[-1].begin > shared:
            stack.pop()
        if stack:
            stack[-1].end = min(stack[-1].end, shared)
        own: PlannedRequest | None = None
        if shared < len(prompt):
            own = PlannedRequest(prompt, len(prompt) - 1, [])
            requests.append(own)
        for segment in stack:
            # Inside a segment the path goes on as its request does; at its end the path may leave it.
            begin = max(segment.begin, first)
            if begin < segment.end:
                want(index, begin - first, _Place(segment.request, begin - 1, 0), segment.end - begin)
            if first <= segment.end and segment.begin <= segment.end:
                token = int(tokens[segment.end])
                want(index, segment.end - first, place(segment.request, segment.end, token, own, shared))
        if own is not None:
            begin = max(shared + 1, first)
            if begin < len(prompt):
                want(index, begin - first, _Place(own, begin - 1, 0), len(prompt) - begin)
            own.final.append(int(tokens[-1]))
            places[id(own), len(prompt)] = {own.final[0]: _Place(own, FINAL, 0)}
            want(index, len(prompt) - first, _Place(own, FINAL, 0))
            stack.append(_Segment(own, shared + 1, len(prompt)))
    return requests


@dataclass(slots=True)
class Answer:
    """What the engine gave for a request: log-probabilities in nats.

    `rows` is [rows, ids] from the request's `start` on; `row_tops` [rows] holds the largest of the whole vocabulary,
    where the engine was asked for it. `final` and `final_top` are the same for the generated position.
    """

    rows: NDArray[np.float64]
    row_tops: NDArray[np.float64] | None
    final: Sequence[float]
    final_top: float


@dataclass(slots=True)
class Pending:
    """A span on its way: values as they come in, and whether each token so far was the most likely one.

    `greedy` is None once a row was read without its largest value.
    """

    values: list[float]
    missing: int
    greedy: bool | None = True

    @classmethod
    def of(cls, span: Span) -> Pending:
        count = len(span.tokens) - span.first
        return cls([0.0] * count, count)

    def fill(self, request: PlannedRequest, part: Slice, answer: Answer) -> None:
        if part.row == FINAL:
            value = answer.final[part.column]
            self.values[part.at] = value
            self._greedy(value >= answer.final_top)
        else:
            begin = part.row - request.start
            values = answer.rows[begin : begin + part.length, part.column]
            self.values[part.at : part.at + part.length] = values.tolist()
            if answer.row_tops is None:
                self._greedy(None)
            else:
                self._greedy(bool((values >= answer.row_tops[begin : begin + part.length]).all()))
        self.missing -= part.length

    def _greedy(self, now: bool | None) -> None:
        if self.greedy is not False and now is not True:
            self.greedy = now

    def result(self) -> tuple[float, bool | None]:
        """Sum in the order of the tokens, as lm-eval sums, and whether greedy decoding would give these tokens."""
        return sum(self.values), self.greedy


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of at most `size` items."""
    window: list[T] = []
    for item in items:
        window.append(item)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
