"""What `stage` wrote down of all models and suites, found by the names that results have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from reproval.files import RecordError, read_record
from reproval.records import DatasetSource, ModelManifest, TaskManifest


@dataclass(frozen=True)
class Manifests:
    """`models` by model, `suites` by suite, `datasets` by (suite, task)."""

    models: dict[str, ModelManifest] = field(default_factory=dict)
    suites: dict[str, TaskManifest] = field(default_factory=dict)
    datasets: dict[tuple[str, str], DatasetSource] = field(default_factory=dict)


def read(paths: Iterable[Path]) -> Manifests:
    """Read manifests of models and of suites, which lie in folders of these names.

    Raises RecordError, also for two that differ and have one name: results do not say which of them is theirs.
    """
    found = Manifests()
    named: dict[tuple[str, str], tuple[Path, str]] = {}

    def only(path: Path, kind: str, name: str, digest: str) -> None:
        first, known = named.setdefault((kind, name), (path, digest))
        if known != digest:
            raise RecordError(
                f"{first} and {path} describe two states of {kind} {name}; expected one; "
                "name only the manifests of these runs"
            )

    for path in paths:
        if path.parent.name == "models":
            model = read_record(path, ModelManifest)
            only(path, "model", model.model, model.digest)
            found.models[model.model] = model
        elif path.parent.name == "suites":
            suite = read_record(path, TaskManifest)
            only(path, "suite", suite.suite, suite.digest)
            found.suites[suite.suite] = suite
            found.datasets.update({(suite.suite, source.task): source for source in suite.datasets})
        else:
            raise RecordError(f"{path}: expected a manifest in a folder `models` or `suites`, as `stage` writes them")
    return found
