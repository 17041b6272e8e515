"""What every document scored, read from samples.jsonl.gz: the numbers alone, in columns.

A line is mostly text that is not looked at, so Arrow reads the few keys that are. It asks for one type a column; a
file in which a metric is now a number and now something else is read line by line, with the same result.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray

from reproval.files import RecordError, sha256_bytes
from reproval.statistics import Floats

KEYS = {
    "task": pa.string(),
    "filter": pa.string(),
    "doc_id": pa.int64(),
    "doc_hash": pa.string(),
    "prompt_hash": pa.string(),
    "metrics": pa.list_(pa.string()),
}
HASH = 64  # hex digits of lm-eval's hashes


@dataclass(frozen=True)
class TaskSamples:
    """What one leaf task with one filter left for every document, ordered by `documents` so that two models' align.

    `documents` and `prompts` are the first 64 bits of lm-eval's hashes. `values` holds plain numbers by metric, NaN
    where a document has none; `weighted` holds (log-likelihood, weight) by metric, as rolling tasks log them.
    """

    documents: NDArray[np.uint64]
    prompts: NDArray[np.uint64]
    values: dict[str, Floats]
    weighted: dict[str, tuple[Floats, Floats]]


SampleKey = tuple[str, str]  # task, filter


class _Irregular(Exception):
    """A file that has to be read line by line."""


def read_samples(path: Path, sha256: str) -> dict[SampleKey, TaskSamples]:
    """Per-document scores by (task, filter) from samples.jsonl.gz, whose SHA-256 the unit's record names.

    Raises RecordError for a file that is missing, another one, or without lm-eval's hashes.
    """
    mend = "Remove the folder that holds it and the evaluation.json of its run, and start again"
    try:
        packed = path.read_bytes()
        if (found := sha256_bytes(packed)) != sha256:
            raise RecordError(f"{path}: SHA-256: expected {sha256} as result.json says, found {found}. {mend}")
        text = gzip.decompress(packed)
        try:
            return by_column(text)
        except (_Irregular, pa.ArrowException):
            return by_line(text)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        kind = type(error).__name__
        raise RecordError(f"{path}: not readable as lm-eval samples ({kind}: {error}). {mend}") from error


def read_all(wanted: Sequence[tuple[Path, str]]) -> list[dict[SampleKey, TaskSamples]]:
    """The same for many files, in their order. Unpacking and parsing leave Python's lock, so threads are enough."""
    workers = min(len(os.sched_getaffinity(0)), max(len(wanted), 1))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda entry: read_samples(*entry), wanted))


# --- by column -----------------------------------------------------------------------------------------------------


def by_column(text: bytes) -> dict[SampleKey, TaskSamples]:
    """Raises _Irregular, pyarrow.ArrowException."""
    if not text.strip():
        return {}
    first = json.loads(text[: text.index(b"\n")] if b"\n" in text else text)
    types = {name: _type(first.get(name)) for name in first["metrics"]}
    if not types or types.keys() & KEYS.keys():
        raise _Irregular
    table = pyarrow.json.read_json(
        pa.BufferReader(text),
        # One block, because a line may be longer than any block that one would choose.
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=min(len(text) + 1, 2**31 - 1)),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=pa.schema([*KEYS.items(), *types.items()]), unexpected_field_behavior="ignore"
        ),
    ).combine_chunks()
    # Another filter or subtask may have metrics that the first line does not name.
    if any(table[name].null_count for name in KEYS):
        raise _Irregular
    if set(pc.unique(pc.list_flatten(table["metrics"])).to_pylist()) != types.keys():
        raise _Irregular
    return _split(table, types)


def _type(value: Any) -> pa.DataType:
    return pa.list_(pa.float64()) if isinstance(value, list) else pa.float64()


def _split(table: pa.Table, types: dict[str, pa.DataType]) -> dict[SampleKey, TaskSamples]:
    names = [table[name].combine_chunks().dictionary_encode() for name in ("task", "filter")]
    tasks, filters = (np.asarray(column.indices) for column in names)
    group = tasks.astype(np.int64) * len(names[1].dictionary) + filters
    documents, prompts = _short_hashes(table["doc_hash"]), _short_hashes(table["prompt_hash"])
    order = np.lexsort((documents, group))
    group, documents, prompts = group[order], documents[order], prompts[order]
    if np.any((group[1:] == group[:-1]) & (documents[1:] == documents[:-1])):
        raise _Irregular  # equal documents in one task are told apart by the lines' order
    columns = {name: _numbers(table[name], kind, order) for name, kind in types.items()}
    begins = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    ends = np.append(begins[1:], group.size)
    given = {name: np.logical_or.reduceat(~np.isnan(parts[0]), begins) for name, parts in columns.items()}
    found = {}
    for index, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        task, filter_name = divmod(int(group[begin]), len(names[1].dictionary))
        mine = {name: tuple(p[begin:end] for p in parts) for name, parts in columns.items() if given[name][index]}
        found[(names[0].dictionary[task].as_py(), names[1].dictionary[filter_name].as_py())] = TaskSamples(
            documents[begin:end],
            prompts[begin:end],
            {name: parts[0] for name, parts in mine.items() if len(parts) == 1},
            {name: (parts[0], parts[1]) for name, parts in mine.items() if len(parts) == 2},
        )
    return found


def _short_hashes(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    if pc.min(pc.binary_length(column)).as_py() != HASH or pc.max(pc.binary_length(column)).as_py() != HASH:
        raise _Irregular
    digits = "".join(pc.utf8_slice_codeunits(column, 0, 16).to_pylist())
    return np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64)


def _numbers(column: pa.ChunkedArray, kind: pa.DataType, order: NDArray[np.int64]) -> tuple[Floats, ...]:
    """One array for plain numbers, two for pairs, NaN where there are none."""
    if not pa.types.is_list(kind):
        return (np.asarray(column.to_numpy(), dtype=np.float64)[order],)
    lengths = pc.list_value_length(column)
    if column.null_count or pc.min(lengths).as_py() != 2 or pc.max(lengths).as_py() != 2:
        raise _Irregular
    pairs = np.asarray(pc.list_flatten(column).to_numpy(), dtype=np.float64).reshape(-1, 2)[order]
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


# --- line by line --------------------------------------------------------------------------------------------------


def by_line(text: bytes) -> dict[SampleKey, TaskSamples]:
    """Raises ValueError, KeyError, TypeError."""
    lines: dict[SampleKey, list[dict[str, Any]]] = {}
    for raw in text.splitlines():
        line = json.loads(raw)
        kept = {name: line.get(name) for name in line["metrics"]}
        kept["/"] = (line["doc_id"], line["doc_hash"], line["prompt_hash"])
        lines.setdefault((line["task"], line["filter"]), []).append(kept)
    return {key: _columns(rows) for key, rows in lines.items()}


def _short(hashed: str) -> int:
    return int(hashed[:16], 16)


def _columns(rows: list[dict[str, Any]]) -> TaskSamples:
    rows.sort(key=lambda row: row["/"][0])
    seen: Counter[str] = Counter()
    documents = []
    for row in rows:
        # Equal documents in one task are told apart by which occurrence they are.
        documents.append((_short(row["/"][1]) + seen[row["/"][1]]) % 2**64)
        seen[row["/"][1]] += 1
    order = np.argsort(np.array(documents, dtype=np.uint64), kind="stable")
    values: dict[str, Floats] = {}
    weighted: dict[str, tuple[Floats, Floats]] = {}
    for metric in dict.fromkeys(name for row in rows for name in row if name != "/"):
        column = [row.get(metric) for row in rows]
        given = [v for v in column if v is not None]
        if all(isinstance(v, int | float) for v in given):
            values[metric] = np.array([np.nan if v is None else float(v) for v in column], dtype=np.float64)[order]
        elif all(isinstance(v, list) and len(v) == 2 and all(isinstance(x, int | float) for x in v) for v in given):
            pairs = np.array([(np.nan, np.nan) if v is None else v for v in column], dtype=np.float64)[order]
            weighted[metric] = (pairs[:, 0], pairs[:, 1])
    return TaskSamples(
        np.array(documents, dtype=np.uint64)[order],
        np.array([_short(row["/"][2]) for row in rows], dtype=np.uint64)[order],
        values,
        weighted,
    )
