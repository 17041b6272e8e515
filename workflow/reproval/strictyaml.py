"""YAML as people mean it: a key given twice is an error, and every key knows its line.

PyYAML keeps the last of two equal keys without a word. Snakemake reads a configfile as JSON first, else as YAML, and so
does this module; what it adds are the lines and the refusals.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[Any, ...]

# The C parser is ten times faster and gives the same nodes; PyYAML may have been built without it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"

_HINTS = {
    "cannot start any token": "indent with spaces, never with tabs, and quote a value that begins with % @ or `",
    "mapping values are not allowed": 'put a value that contains ": " in quotes, and check the indentation',
    "expected <block end>": "check the indentation: keys of one mapping begin in the same column",
    "could not find expected ':'": 'write "key: value", with a space after the colon',
    "found unexpected end of stream": "close the quote or bracket that was opened",
    "single document": "keep one document: delete what follows the second ---",
    "undefined alias": "define the anchor (&name) above its use, or quote a value that begins with *",
    "could not determine a constructor": "delete the tag (!...); only plain YAML is read",
}


class YamlError(Exception):
    """A file is not YAML. `line` counts from 1; `found` quotes nothing from the file, which may hold a secret."""

    def __init__(self, line: int | None, found: str, mend: str) -> None:
        super().__init__(found)
        self.line, self.found, self.mend = line, found, mend


@dataclass(frozen=True)
class Mark:
    """Where a key or a list item stands, and a scalar value as it is written there (None for the rest)."""

    line: int
    written: str | None


@dataclass(frozen=True)
class Duplicate:
    path: KeyPath
    lines: tuple[int, int]


@dataclass
class Document:
    """A file's content, with the line of every key and list item."""

    data: Any
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    duplicates: list[Duplicate] = field(default_factory=list)


def read(path: Path) -> Document:
    """Read a JSON or YAML file; an empty one is an empty mapping. Raises OSError and YamlError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(None, "bytes that are not UTF-8", "save the file as UTF-8") from error
    try:
        data, is_json = json.loads(text), True
        # JSON may be indented by tabs, which YAML refuses; its strings cannot hold a raw tab.
        text = text.replace("\t", " ")
    except (ValueError, RecursionError):
        data, is_json = None, False
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = Document(data={})
        if node is not None:
            _walk(loader, node, (), document, frozenset())
            document.data = data if is_json else loader.construct_document(node)
        return document
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        found = getattr(error, "problem", None) or "a character that YAML does not allow"
        line = mark.line + 1 if mark else None
        hint = next((hint for sign, hint in _HINTS.items() if sign in found), None)
        raise YamlError(line, _plain(found), hint or "check the indentation, quotes and brackets there") from None
    except RecursionError:
        raise YamlError(None, "more levels than can be read", "nest less") from None
    finally:
        loader.dispose()


def _plain(problem: str) -> str:
    """The parser's words without what it quotes from the file beyond one character."""
    return problem if len(problem) < 160 else problem[:157] + "..."


def _walk(loader: Any, node: yaml.Node, path: KeyPath, document: Document, above: frozenset[int]) -> None:
    """Note the lines below `node`. `above` holds the nodes on the way, since an alias may contain itself."""
    line = node.start_mark.line + 1
    if id(node) in above:
        raise YamlError(line, "an alias that contains itself", "write the value out")
    above |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note(document, (*path, index), item, item)
            _walk(loader, item, (*path, index), document, above)
    if not isinstance(node, yaml.MappingNode):
        return
    # Merged keys (<<) come first, so that the mapping's own keys take their place.
    for key, value in node.value:
        if key.tag == _MERGE:
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _walk(loader, merged, path, document, above)
    seen: dict[Any, int] = {}
    for key_node, value in node.value:
        if key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        key_line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise YamlError(key_line, "a list or mapping as a key", "write a plain name before the colon")
        if key in seen:
            document.duplicates.append(Duplicate((*path, key), (seen[key], key_line)))
        seen[key] = key_line
        _note(document, (*path, key), key_node, value)
        _walk(loader, value, (*path, key), document, above)


def _note(document: Document, path: KeyPath, at: yaml.Node, value: yaml.Node) -> None:
    written = value.value if isinstance(value, yaml.ScalarNode) else None
    document.marks[path] = Mark(at.start_mark.line + 1, written)
