"""What is wrong with a configuration, said so that it can be mended: place, key, found, expected, mend.

Nothing here prints a secret: every value passes through `redact` on its way into a message.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reproval.scrub import ISSUED_TOKEN
from reproval.strictyaml import Document, KeyPath, Mark

ABSENT: Any = object()

SECRET = ISSUED_TOKEN


def redact(text: str) -> str:
    """The text with everything that looks like an access token replaced."""
    return SECRET.sub("(a secret, not shown)", text)


@dataclass(frozen=True)
class Problem:
    """One thing to mend. `place` is FILE:LINE, FILE, or `--config`; `key` is dotted. No field holds a secret."""

    place: str
    key: str
    found: str
    expected: str
    mend: str

    def __post_init__(self) -> None:
        for name, text in vars(self).copy().items():
            object.__setattr__(self, name, redact(text))

    def __str__(self) -> str:
        heading = ": ".join(part for part in (self.place, self.key) if part)
        lines = [("found", self.found), ("expected", self.expected), ("mend", self.mend)]
        return "\n".join([heading, *(f"  {label + ':':<10}{text}" for label, text in lines)])


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds every reason, str() the text for people."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.text())

    def text(self) -> str:
        count = len(self.problems)
        heading = f"The configuration has {count} problem{'s' if count != 1 else ''}; nothing was started."
        return "\n\n".join([heading, *map(str, self.problems)])


def show(value: Any) -> str:
    """A value as it stands in YAML, short, on one line, with its kind where that is not plain to see."""
    if value is None:
        return "null (no value)"
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"{value} (not a finite number)"
    if isinstance(value, str):
        text = json.dumps(redact(value), ensure_ascii=False)
        return text if len(text) <= 100 else text[:96] + '..."'
    if isinstance(value, Mapping):
        return f"a mapping with {listing(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, Sequence):
        shown = ", ".join(show(item) for item in value[:6])
        return f"[{shown}{', ...' if len(value) > 6 else ''}]" if value else "an empty list"
    return f"{value} (YAML reads it as a {type(value).__name__})"


def listing(names: Iterable[str], most: int = 14) -> str:
    """Names on one line, cut after `most`; `nothing` if there are none."""
    names = [redact(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that `word` was probably meant to be, whatever its case, or None."""
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=cutoff)
    return by_fold[close[0]] if close else None


def dotted(path: KeyPath) -> str:
    """A key path as people write it: suites.mmlu.tasks[2].num_fewshot."""
    text = ""
    for part in path:
        if isinstance(part, int) and not isinstance(part, bool):
            text += f"[{part}]"
        else:
            plain = isinstance(part, str) and re.fullmatch(r"[\w-][\w./-]*", part)
            text += ("." if text else "") + (str(part) if plain else show(part))
    return text


def lookup(data: Any, path: KeyPath) -> Any:
    """The value at a path, or ABSENT."""
    for part in path:
        inside = part in data if isinstance(data, Mapping) else isinstance(data, list) and part in range(len(data))
        if not inside:
            return ABSENT
        data = data[part]
    return data


def starts_with(path: KeyPath, prefix: KeyPath) -> bool:
    return path[: len(prefix)] == prefix


@dataclass
class Report:
    """Collects problems of one configuration, and knows which file and line gave each value.

    `faults` are the paths whose value cannot be relied on. A check that reads one of them says nothing: one
    mistake, one message.
    """

    merged: dict[Any, Any]
    documents: list[tuple[str, Document]]
    faults: set[KeyPath] = field(default_factory=set)
    _entries: list[tuple[tuple[int, int], Problem]] = field(default_factory=list)

    def problems(self) -> list[Problem]:
        """In the order of the files and their lines; equal ones once."""
        return list(dict.fromkeys(problem for _, problem in sorted(self._entries, key=lambda entry: entry[0])))

    def sound(self, path: KeyPath) -> bool:
        """Whether nothing is wrong at the path, above it, or below it."""
        return not any(starts_with(path, fault) or starts_with(fault, path) for fault in self.faults)

    def names(self, section: str) -> list[Any]:
        """The keys of a mapping of names, sound or not; empty if it is no mapping."""
        value = lookup(self.merged, (section,))
        return list(value) if isinstance(value, Mapping) and (section,) not in self.faults else []

    def section(self, path: KeyPath) -> dict[Any, Any]:
        """The sound keys of the mapping at a path; empty if there is no mapping."""
        value = lookup(self.merged, path)
        if not isinstance(value, Mapping):
            return {}
        return {key: entry for key, entry in value.items() if self.sound((*path, key))}

    def add(
        self, path: KeyPath, *, found: str, expected: str, mend: str, reads: Iterable[KeyPath] = (), fault: bool = False
    ) -> None:
        """Add a problem of the value at `path`, unless something that the check `reads` is already at fault."""
        if all(self.sound(read) for read in reads):
            order, place = self.place(path)
            self._entries.append((order, Problem(place, dotted(path), found, expected, mend)))
            if fault:
                self.faults.add(path)

    def add_at(self, number: int, line: int | None, path: KeyPath, *, found: str, expected: str, mend: str) -> None:
        """Add a problem of a file's text: `number` counts the files from 0."""
        name = self.documents[number][0]
        place = f"{name}:{line}" if line else name
        self._entries.append(((number, line or 0), Problem(place, dotted(path), found, expected, mend)))

    def place(self, path: KeyPath) -> tuple[tuple[int, int], str]:
        """Where the value that counts was written: the last file that gives it, or `--config`.

        A key that is missing is at home where the mapping that lacks it stands.
        """
        while path:
            value = lookup(self.merged, path)
            if value is not ABSENT:
                source = self._source(path, value)
                if source is None:
                    return (len(self.documents), 0), "--config"
                number, mark = source
                return (number, mark.line), f"{self.documents[number][0]}:{mark.line}"
            path = path[:-1]
        last = len(self.documents) - 1
        return (max(last, 0), 0), self.documents[last][0] if self.documents else "--config"

    def written(self, path: KeyPath) -> str | None:
        """A scalar as it stands in the file, before YAML made a number or a date of it."""
        source = self._source(path, lookup(self.merged, path))
        return source[1].written if source else None

    def from_command_line(self, path: KeyPath) -> bool:
        value = lookup(self.merged, path)
        return value is not ABSENT and self._source(path, value) is None

    def _source(self, path: KeyPath, value: Any) -> tuple[int, Mark] | None:
        for number, (_, document) in reversed(list(enumerate(self.documents))):
            mark = document.marks.get(path)
            if mark is not None:
                given = lookup(document.data, path)
                # repr, since 1 == True and nan != nan.
                if (isinstance(given, Mapping) and isinstance(value, Mapping)) or repr(given) == repr(value):
                    return number, mark
        return None
