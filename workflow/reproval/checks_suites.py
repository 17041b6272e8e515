"""What a suite of a configuration must satisfy: its tasks, their files, and settings that go together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reproval.checks_names import check_folder_name
from reproval.folders import kind_of, resolve, unexpanded, walk
from reproval.problems import Report, lookup, show
from reproval.settings import TaskSettings
from reproval.strictyaml import KeyPath

TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._()+-]{0,127}")


def check_suite(report: Report, at: KeyPath, base: Path, workdir: Path) -> None:
    """Report what is wrong with the suite at a path: its files, and its settings and those of its tasks."""
    suite = lookup(report.merged, at)
    if not isinstance(suite, Mapping):
        return
    suite = {key: value for key, value in suite.items() if key == "tasks" or report.sound((*at, key))}
    _include_path(report, (*at, "include_path"), suite.get("include_path"), base, workdir)
    _settings(report, at, suite, {})
    tasks = suite.get("tasks")
    seen: dict[str, tuple[int, str]] = {}
    for index, entry in enumerate(tasks if isinstance(tasks, list) else []):
        item = (*at, "tasks", index)
        if isinstance(entry, Mapping):
            sound = {key: value for key, value in entry.items() if report.sound((*item, key))}
            _settings(report, item, sound, suite)
            entry, item = sound.get("task"), (*item, "task")
        if isinstance(entry, str) and entry:
            _task(report, item, entry)
            _once(report, item, index, entry, seen)


def _once(report: Report, at: KeyPath, index: int, task: str, seen: dict[str, tuple[int, str]]) -> None:
    first, name = seen.setdefault(task.casefold(), (index, task))
    if first == index:
        return
    if name == task:
        report.add(
            at,
            found=f"{task} for the second time (first: tasks[{first}])",
            expected="each task once in a suite, since its results have one folder",
            mend="delete one, or put it into a second suite to run it with other settings",
        )
    else:
        report.add(
            at,
            found=f"{task} beside {name}",
            expected="tasks of a suite that differ in more than upper and lower case, since each becomes a folder",
            mend="put one of them into a second suite",
        )


def _task(report: Report, at: KeyPath, task: str) -> None:
    if TASK.fullmatch(task) and ".." not in task:
        check_folder_name(report, at, task)
        return
    if any(sign in task for sign in "*?["):
        mend = "name the tasks, or their group or tag: patterns are not expanded"
    elif task.endswith((".yaml", ".yml")):
        mend = "write the `task:` name that stands in the file, and the file's folder as include_path"
    elif "," in task:
        mend = f"write a list: [{', '.join(part.strip() for part in task.split(','))}]"
    else:
        mend = "write the name as `lm_eval ls tasks` lists it"
    report.add(
        at,
        found=show(task),
        expected="a task, group or tag name: letters, digits and . _ - + ( ), which becomes a folder",
        mend=mend,
    )


def _include_path(report: Report, at: KeyPath, value: Any, base: Path, workdir: Path) -> None:
    if not isinstance(value, str):
        return
    folder = resolve(value, workdir, base)
    expected = "a folder with lm-eval task files (*.yaml)"
    kind = kind_of(folder)
    if kind != "folder":
        found = "a file" if kind else "nothing there"
        where = "correct the path, which is relative to the working directory or to the workflow's folder"
        mend = unexpanded(value) or ("write the folder that the file is in" if kind else where)
        report.add(at, found=f"{show(value)}: {found}", expected=expected, mend=mend)
    elif folder.resolve() in (workdir.resolve(), *workdir.resolve().parents):
        report.add(
            at,
            found=f"{show(value)}: it holds the working directory, and with it all results",
            expected=expected + " and what they need",
            mend="put the task files into a folder of their own",
        )
    else:
        found, mend = "no *.yaml", "name the folder with the task files (lm-eval does not read *.yml)"
        try:
            # To the end: what cannot be read is said here, not when the content is hashed.
            suffixes = {path.suffix for path in walk(folder)}
        except OSError as error:
            suffixes, found = set(), f"{error.filename} cannot be read ({error.strerror})"
            mend = "correct the permissions or the broken link"
        if ".yaml" not in suffixes:
            report.add(at, found=f"{show(value)}: {found}", expected=expected, mend=mend)


def _settings(report: Report, at: KeyPath, own: Mapping[Any, Any], suite: Mapping[Any, Any]) -> None:
    """Check the settings that `own` gives, with those of `suite` behind them."""
    both = {**{key: value for key, value in suite.items() if key in TaskSettings.model_fields}, **own}
    _limit(report, (*at, "limit"), own.get("limit"))
    multiturn = (*at, "fewshot_as_multiturn")
    if own.get("fewshot_as_multiturn") is True and not both.get("apply_chat_template"):
        report.add(
            multiturn,
            found="true without apply_chat_template",
            expected="apply_chat_template too: turns exist only in a chat template",
            mend="add apply_chat_template: true, or delete fewshot_as_multiturn",
            reads=[(*at, "apply_chat_template")],
        )
    elif "apply_chat_template" in own and not own["apply_chat_template"] and both.get("fewshot_as_multiturn") is True:
        report.add(
            (*at, "apply_chat_template"),
            found=f"{show(own['apply_chat_template'])} where the suite has fewshot_as_multiturn: true",
            expected="both, or neither",
            mend="add fewshot_as_multiturn: false to this task",
        )
    _generation(report, (*at, "generation"), own.get("generation"), suite.get("generation"))


def _limit(report: Report, at: KeyPath, limit: Any) -> None:
    if not isinstance(limit, float) or not math.isfinite(limit) or limit < 1:
        return
    if limit == 1:
        report.add(
            at,
            found="1.0, which lm-eval takes for one document",
            expected="a number of documents, or a fraction below 1",
            mend="delete limit for all documents, or write 1 for one",
        )
    elif limit != int(limit):
        report.add(
            at,
            found=show(limit),
            expected="a whole number of documents, or a fraction below 1",
            mend=f"write {int(limit)}, or {limit / 100:g} if {limit:g} percent are meant",
        )


def _generation(report: Report, at: KeyPath, own: Any, suite: Any) -> None:
    if not isinstance(own, Mapping):
        return
    both = {**(suite if isinstance(suite, Mapping) else {}), **own}
    temperature, sample = both.get("temperature"), both.get("do_sample")
    reads = [(*at, "temperature"), (*at, "do_sample")]
    degrees = temperature if isinstance(temperature, int | float) and not isinstance(temperature, bool) else None
    if degrees is not None and degrees > 0 and sample is not True:
        report.add(
            (*at, "temperature") if "temperature" in own else (*at, "do_sample"),
            found=f"temperature: {show(temperature)} "
            + ("without do_sample" if sample is None else "with do_sample: false"),
            expected="do_sample: true; where it is false, as most tasks have it, lm-eval sets temperature back to 0",
            mend="add do_sample: true, or delete temperature",
            reads=reads,
        )
    if degrees == 0 and sample is True:
        report.add(
            (*at, "do_sample") if "do_sample" in own else (*at, "temperature"),
            found=f"do_sample: true with temperature: {show(temperature)}",
            expected="a temperature above 0: at 0 nothing is sampled",
            mend="write do_sample: false, or a temperature",
            reads=reads,
        )
    least, most = both.get("min_tokens"), both.get("max_gen_toks")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        report.add(
            (*at, "min_tokens") if "min_tokens" in own else (*at, "max_gen_toks"),
            found=f"min_tokens: {least} with max_gen_toks: {most}",
            expected="min_tokens of at most max_gen_toks",
            mend="lower min_tokens or raise max_gen_toks",
            reads=[(*at, "min_tokens"), (*at, "max_gen_toks")],
        )
