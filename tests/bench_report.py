"""How long collect and report take for many scores: `python tests/bench_report.py [SCORES] [FOLDER]`.

Twenty models on groups of subtasks, every subtask with its samples. The times are printed, and compared with nothing.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "unit"))

import synthetic

from reproval import collect, report, report_html, report_markdown

MODELS = 20
SUBTASKS = 83  # with the group and two metrics each: 168 scores a group
DOCUMENTS = 20


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    print(f"{what:32} {time.perf_counter() - begin:7.2f} s", flush=True)


def main() -> None:
    scores = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    groups = -(-scores // (MODELS * 2 * (SUBTASKS + 1)))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
        models = [synthetic.Model(f"model-{i:02d}", 0.45 + 0.02 * i) for i in range(MODELS)]
        tasks = [synthetic.Task(f"group{i:02d}", "group", DOCUMENTS, SUBTASKS) for i in range(groups)]
        with timed("(writing what is measured)"):
            project = synthetic.write_project(root, models, tasks)
        begin = time.perf_counter()
        with timed("read records and samples"):
            loaded = collect.load(project.results, project.evaluations)
        with timed("intervals"):
            table = collect.rows(loaded)
        with timed("scores.csv and scores.parquet"):
            collect.write_table(table, root / "scores.csv", root / "scores.parquet")
        with timed("comparisons and content"):
            built = report.build(loaded)
        with timed("report.json"):
            (root / "report.json").write_text(built.model_dump_json(), encoding="utf-8")
        with timed("report.md"):
            (root / "report.md").write_text(report_markdown.render(built), encoding="utf-8")
        with timed("report.html"):
            (root / "report.html").write_text(report_html.render(built), encoding="utf-8")
        print(f"{'all of it':32} {time.perf_counter() - begin:7.2f} s")
        samples = sum(s.documents.size for m in loaded for u in m.units for s in u.samples.values())
        print(f"{len(table):,} scores of {samples:,} samples, {len(built.comparisons):,} comparisons")
        for name in ("scores.csv", "scores.parquet", "report.json", "report.md", "report.html"):
            print(f"{name:32} {(root / name).stat().st_size / 1e6:7.2f} MB")
        print(f"{'highest resident memory':32} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:7.0f} MiB")


if __name__ == "__main__":
    main()
