"""report.html as a reader has it: opened in headless Chromium, with its script run.

Screenshots are left in the test's temporary folder, or in REPROVAL_SCREENSHOTS if that is set.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))

import synthetic

from reproval import collect, report, report_html, words
from reproval.report_content import Report

PROBES = Path(__file__).with_name("report_probes.js")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on PATH (Debian: apt-get install --no-install-recommends chromium)"
)

TASKS = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 60, 30, suite="open", shots=5))
MODELS = (*synthetic.DEMO_MODELS, synthetic.GPU_MODELS[2])
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Report:
    project = synthetic.write_project(tmp_path_factory.mktemp("page"), MODELS, TASKS)
    return report.build(collect.load(project.results, project.evaluations))


@pytest.fixture(scope="module")
def page(built: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "report.html"
    path.write_text(report_html.render(built), encoding="utf-8")
    return path


def chromium(page: Path, folder: Path, *arguments: str, width: int = 1280, dark: bool = False) -> str:
    """Run Chromium on a page with a profile of its own; what it prints."""
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2400"]
    if dark:
        flags += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    command = [str(CHROMIUM), *flags, *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return done.stdout


FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<body><pre id="answer"></pre><iframe src="probe.html" style="border: 0; width: %dpx; height: 2400px"></iframe>
<script>addEventListener("message", ({ data }) => document.getElementById("answer").append(data));</script>"""


def ask(page: Path, folder: Path, name: str, *, width: int = 1280, dark: bool = False) -> Any:
    """The JSON value that a probe of report_probes.js returns, after the page's own script has run.

    The page lies in a frame of the given width, because Chromium's own window is never narrower than 500 pixels.
    """
    script = f"{PROBES.read_text(encoding='utf-8')}\nparent.postMessage(JSON.stringify(probes.{name}()), '*');"
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    (folder / "probe.html").write_text(text, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    dom = chromium(frame, folder, "--virtual-time-budget=5000", "--dump-dom", width=1400, dark=dark)
    found = re.search(r'<pre id="answer">(.+?)</pre>', dom, re.DOTALL)
    assert found, f"the page's script or the probe {name} failed"
    return json.loads(html.unescape(found[1]))


def test_every_number_of_the_page_is_that_of_its_record(built: Report, page: Path, tmp_path: Path) -> None:
    shown = ask(page, tmp_path, "numbers")
    assert len(shown["lines"]) == len(built.headlines)
    for row, line in zip(shown["lines"], built.headlines, strict=True):
        assert row[0][1].startswith(line.task)
        for (raw, text), cell in zip(row[1:-2], line.cells, strict=True):
            assert cell is not None
            assert float(raw) == cell.value
            mark = "†" if cell.score_levers else ""
            interval = f"{words.number(cell.low)} to {words.number(cell.high)}"
            cut = f"{cell.prompts_cut} prompts cut" if cell.prompts_cut else ""
            assert re.sub(r"\s+", "", text) == re.sub(r"\s+", "", words.number(cell.value) + mark + interval + cut)
    assert len(shown["pairs"]) == len(built.comparisons)
    for row, pair in zip(shown["pairs"], built.comparisons, strict=True):
        assert float(row[3][0]) == pair.effect
        assert float(row[4][0]) == pair.p_holm
        assert row[3][1].startswith(words.signed(pair.effect, pair.scale))
        assert row[2][1] == (pair.better if pair.significant else "none shown")
    assert len(shown["scores"]) == len(built.scores.rows)
    for row, values in zip(shown["scores"], built.scores.rows, strict=True):
        record = dict(zip(built.scores.columns, values, strict=True))
        assert [row[0][1], row[2][1], row[3][1]] == [record["model"], record["metric"], record["filter"]]
        assert float(row[4][0]) == record["value"]
        assert row[4][1].removesuffix("†") == words.number(record["value"], 4)
        assert row[4][1].endswith("†") == bool(record["score_levers"])
    for row, entry in zip(shown["memory"], built.memory, strict=True):
        assert float(row[2][0]) == entry.predicted_bytes
        assert float(row[3][0]) == entry.measured_bytes


def test_tables_sort_by_numbers_and_by_names_and_back(built: Report, page: Path, tmp_path: Path) -> None:
    found = ask(page, tmp_path, "sorting")
    values = sorted(row[built.scores.columns.index("value")] for row in built.scores.rows)
    assert [float(v) for v in found["up"]] == values
    assert [float(v) for v in found["down"]] == values[::-1]
    assert (found["said"], found["then"], found["left"]) == ("ascending", "descending", None)
    known = [v for v in found["stderr"] if v]
    assert found["stderr"] == known + [""] * (len(values) - len(known))
    assert len(known) < len(values)
    assert found["names"] == sorted(found["names"])


def test_tables_filter_and_turn_pages(built: Report, page: Path, tmp_path: Path) -> None:
    found = ask(page, tmp_path, "filtering")
    total = len(built.scores.rows)
    assert total > 100
    assert len(found["first"]) == len(found["second"]) == found["again"] == 50
    assert found["first"] != found["second"]
    assert found["begin"] == f"1 to 50 of {total}"
    assert found["locked"] is True
    assert len(found["matching"]) == 2
    assert all("capitals" in row and "smollm2-135m-fp32" in row for row in found["matching"])
    assert found["nothing"] == [0, "Nothing matches"]
    assert found["label"] == "Filter: Every score"


def test_the_switch_changes_colours_and_says_what_it_does(page: Path, tmp_path: Path) -> None:
    light, dark = ask(page, tmp_path, "theme")
    assert light[1] == "Switch to dark colours"
    assert dark[1] == "Switch to light colours"
    assert light[0] != dark[0]
    assert ask(page, tmp_path, "theme", dark=True)[0] == dark


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast_and_the_page_does_not_scroll_sideways(
    page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1, and 3 to 1 for large text; relative luminance as defined there."""
    found = ask(page, tmp_path, "legibility", width=width, dark=dark)
    assert found["seen"] > 500
    assert found["poor"] == {}
    assert found["width"] == width
    assert found["wide"] <= 0


def test_the_structure_is_one_that_a_screen_reader_can_follow(page: Path, tmp_path: Path) -> None:
    found = ask(page, tmp_path, "structure")
    levels = found["levels"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert found["sections"] == [
        "scores", "fit", "memory", "time", "failures", "cuts", "provenance", "reproduce",
    ]  # fmt: skip
    assert (found["uncaptioned"], found["unscoped"], found["headless"], found["unnamed"]) == (0, 0, [], 0)
    assert found["figures"] == len(TASKS) + len(MODELS)
    assert found["dead"] == []
    assert found["language"] == "en"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_screenshots_can_be_taken(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    folder = Path(os.environ.get("REPROVAL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"report-{width}-{'dark' if dark else 'light'}.png"
    chromium(page, tmp_path, f"--screenshot={picture}", width=width, dark=dark)
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (width, 2400)
    assert picture.stat().st_size > 50_000


def test_all_pages_of_a_table_are_printed_and_what_was_filtered_out_is_not(
    built: Report, page: Path, tmp_path: Path
) -> None:
    found = ask(page, tmp_path, "printed")
    assert found["whole"] == len(built.scores.rows) > 100
    assert found["head"] == "contents", "Chromium repeats no head on the next page that has the box of a button in it"
    assert found["filtered"] == sum("capitals" in row for row in built.scores.rows) > 1


def test_it_prints(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    chromium(page, tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    data = paper.read_bytes()
    assert data.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 60
