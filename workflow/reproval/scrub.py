"""What goes into no report: secrets, and paths outside the project with the names in them."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET = "[secret removed]"
OUTSIDE = "[path outside the project]"
NUMBERS = (float, int, bool, type(None))

# Tokens by the shapes that their issuers document, each by text that it cannot be without: that is found a hundred
# times faster than an expression in the megabytes of a report.
_ISSUED = {
    "hf_": r"hf_[A-Za-z0-9]{20,}",
    "sk-": r"sk-[A-Za-z0-9_-]{20,}",
    **{f"gh{kind}_": rf"gh{kind}_[A-Za-z0-9]{{20,}}" for kind in "pousr"},
    "github_pat_": r"github_pat_\w{20,}",
    "glpat-": r"glpat-[\w-]{16,}",
    "AKIA": r"AKIA[0-9A-Z]{16}\b",
}
# What else gives access. A configuration is not searched for these: an image with tag and digest has the last one's.
_OTHERS = {
    "Bearer": r"Bearer\s+[\w.~+/=-]{16,}",
    "eyJ": r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}",
    "://": r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)",
}
_BEGIN = r"(?<![A-Za-z0-9])"
_TOKENS = {marker: re.compile(_BEGIN + pattern) for marker, pattern in (_ISSUED | _OTHERS).items()}
ISSUED_TOKEN = re.compile(f"{_BEGIN}(?:{'|'.join(_ISSUED.values())})")
# As in profiles/pbs/submit, which can import nothing. The tokens of TOKENIZERS_PARALLELISM and of some ten of vLLM's
# variables are those of text.
SECRET_NAME = re.compile(
    r"^(?!TOKENIZERS_|VLLM_)\w*TOKEN|TOKEN$|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE
)
# Two components at least: "/s" is a unit. After a letter or a dot it is part of a relative path, an image or a URL.
_PATH = re.compile(r"file://[^\s\"'<>]+|(?<![\w./-])(?:~[\w.-]*)?/[\w.+@~-]+(?:/[\w.+@~-]+)+/?")


def secret_values(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Name and value of variables that are named like secrets, long enough not to be found by chance."""
    return {name: value for name, value in env.items() if SECRET_NAME.search(name) and len(value) >= 8}


def scrub(value: Any, project: Path, env: Mapping[str, str] = os.environ) -> tuple[Any, int]:
    """The same JSON value with secrets and foreign paths replaced, and how many were.

    A path inside `project` becomes relative to it.
    """
    secrets, root = secret_values(env).values(), str(project.resolve()).rstrip("/")
    seen: dict[str, str] = {}
    removed = 0

    def path(match: re.Match[str]) -> str:
        nonlocal removed
        found = match.group().removeprefix("file://")
        if found.rstrip("/") == root:
            return "."
        if found.startswith(root + "/"):
            return found[len(root) + 1 :]
        removed += 1
        return OUTSIDE

    def token(match: re.Match[str]) -> str:
        nonlocal removed
        removed += 1
        return SECRET

    def text(given: str) -> str:
        nonlocal removed
        for secret in secrets:
            if secret in given:
                removed += given.count(secret)
                given = given.replace(secret, SECRET)
        for marker, pattern in _TOKENS.items():
            if marker in given:
                given = pattern.sub(token, given)
        return _PATH.sub(path, given)

    def walk(item: Any) -> Any:
        kind = type(item)
        if kind is str:
            if item not in seen:
                seen[item] = text(item)
            return seen[item]
        if kind is list:
            # Most of a report is a table of numbers.
            return [x if type(x) in NUMBERS else walk(x) for x in item]
        if kind is dict:
            return {walk(k): x if type(x) in NUMBERS else walk(x) for k, x in item.items()}
        return item

    return walk(value), removed


def own(text: str, env: Mapping[str, str] = os.environ) -> str | None:
    """What a text holds of this user's own, without showing it: for text that may hold anything that looks secret.

    Also as JSON and HTML write it, where a secret has quotes, backslashes, ampersands or letters beyond ASCII.
    """
    for name, value in secret_values(env).items():
        written = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], html.escape(value)}
        if any(form in text for form in written):
            return f"the value of the environment variable {name}"
    home = str(Path.home())
    return "the home folder" if len(home) > len("/root") and home + "/" in text else None


def leaks(text: str, env: Mapping[str, str] = os.environ) -> str | None:
    """What kind of thing a finished report would give away, without showing it; None if nothing."""
    shaped = any(marker in text and pattern.search(text) for marker, pattern in _TOKENS.items())
    return "something shaped like a token" if shaped else own(text, env)
