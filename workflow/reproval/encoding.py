"""Texts to tokens as lm-eval 0.4.13 encodes them, many at once.

`model` is an lm-eval LM whose `tok_encode` takes a text or a list of texts, with a `prefix_token_id`. A text that many
requests share is encoded once, and a fast tokenizer uses all cores for a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reproval.requests import Tokens

TEXTS_AT_ONCE = 64
"""Requests that are encoded in one call where their texts may be long: enough for all cores, and little memory."""


def as_tokens(ids: Sequence[int]) -> Tokens:
    return np.array(ids, dtype=np.int32)


def encode_texts(model: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """The tokens of each text, an empty one included, which has none."""
    unique = [text for text in dict.fromkeys(texts) if text]
    return {"": [], **dict(zip(unique, model.tok_encode(unique), strict=True))}


def encode_pairs(model: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    """(context, continuation) of each pair of texts: TemplateLM.loglikelihood and its _encode_pair."""
    kept = [context.rstrip() for context, _ in pairs]
    wholes = encode_texts(model, {context + continuation for context, continuation in pairs if context})
    contexts = {text: as_tokens(ids) for text, ids in encode_texts(model, kept).items()}
    encoded = []
    for (context, continuation), kept_context in zip(pairs, kept, strict=True):
        if context:
            # Trailing spaces go over to the continuation, so the text as a whole stays the same.
            ids = contexts[kept_context]
            encoded.append((ids, as_tokens(wholes[context + continuation][len(ids) :])))
            continue
        alone = model.tok_encode(continuation, add_special_tokens=False)
        prefix = model.prefix_token_id
        first, rest = ([prefix], alone) if prefix != alone[0] else (alone[:1], alone[1:])
        encoded.append((as_tokens(first), as_tokens(rest)))
    return encoded
