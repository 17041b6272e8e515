"""What a model of a configuration must satisfy: its source, and what the GPU can do with its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reproval import capability
from reproval.checks_names import has_braces
from reproval.folders import FolderError, check_model_folder, kind_of, model_config, resolve, unexpanded
from reproval.problems import Report, listing, nearest, show
from reproval.strictyaml import KeyPath

COMMIT = re.compile(r"[0-9a-f]{40}")
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
# Arguments of a tokenizer's apply_chat_template beside the template's own variables, as lm-eval calls it.
RENDERING = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template")


def check_model(report: Report, at: KeyPath, workdir: Path, folders: dict[Path, FolderError | None]) -> None:
    """Report what is wrong with the model at a path. `folders` keeps what was found in those that models share."""
    model = report.section(at)
    hub, path = model.get("hub"), model.get("path")
    sources = [(*at, "hub"), (*at, "path")]
    if hub is not None and path is not None:
        report.add(
            at,
            found=f"hub: {show(hub)} and path: {show(path)}",
            expected="either hub or path",
            mend="delete path for the Hub's model, or hub for the one in the folder",
        )
    elif hub is not None:
        _hub(report, at, hub, model)
    elif path is not None:
        _local(report, at, path, model, workdir, folders)
    elif report.sound(at):
        report.add(
            at,
            found="neither hub nor path",
            expected="where the model comes from",
            mend="add hub: ORGANIZATION/NAME and revision: COMMIT, or path: FOLDER",
            reads=sources,
        )
    _quantization(report, at, model, workdir)
    _dtype(report, at, model)
    _thinking(report, at, model)
    _suites_of(report, at, model)


def _hub(report: Report, at: KeyPath, hub: str, model: dict[Any, Any]) -> None:
    if ".." in hub or "--" in hub or hub[-1] in ".-" or len(hub) > 96:
        report.add(
            (*at, "hub"),
            found=show(hub),
            expected="an id that the Hub can have: no .. or --, no dot or dash at the end, 96 characters at most",
            mend="copy the id from the model's page",
        )
        return
    revision, key = model.get("revision"), (*at, "revision")
    floating = model.get("allow_floating") is True
    resolve_it = f"git ls-remote https://huggingface.co/{hub}"
    expected = "a commit, 40 hex digits" + (", or a branch or tag" if floating else "")
    reads = [key, (*at, "hub"), (*at, "allow_floating")]
    if revision is None:
        mend = f"add revision: with the first column of `{resolve_it} HEAD`"
        report.add(key, found="nothing", expected=expected, mend=mend, reads=reads)
    elif COMMIT.fullmatch(revision):
        return
    elif COMMIT.fullmatch(revision.strip().lower()):
        report.add(key, found=show(revision), expected=expected, mend=f"write {revision.strip().lower()}", reads=reads)
    elif not REFERENCE.fullmatch(revision) or ".." in revision:
        mend = f"choose from `{resolve_it}`"
        report.add(key, found=show(revision), expected=expected, mend=mend, reads=reads)
    elif re.fullmatch(r"[0-9a-f]{7,}", revision) and not floating:
        mend = f"write all 40 digits, as https://huggingface.co/{hub}/commits/main shows them"
        found = f"{show(revision)} ({len(revision)} digits)"
        report.add(key, found=found, expected=expected, mend=mend, reads=reads)
    elif not floating:
        report.add(
            key,
            found=f"{show(revision)}, a branch or tag",
            expected=expected + ": a branch may point to other weights tomorrow",
            mend=f"write the first column of `{resolve_it} {revision}`, or add allow_floating: true",
            reads=reads,
        )


def _local(
    report: Report,
    at: KeyPath,
    path: str,
    model: dict[Any, Any],
    workdir: Path,
    folders: dict[Path, FolderError | None],
) -> None:
    for key in ("revision", "allow_floating", "gated"):
        if model.get(key):
            report.add(
                (*at, key),
                found=f"{key}: {show(model[key])} beside path: {show(path)}",
                expected=f"{key} only with hub; a local folder is identified by what is in it",
                mend=f"delete {key}",
            )
    if has_braces(report, (*at, "path"), path):
        return
    folder = resolve(path, workdir)
    if folder not in folders:
        try:
            check_model_folder(folder)
            folders[folder] = None
        except FolderError as error:
            folders[folder] = error
    problem = folders[folder]
    if problem is not None:
        mend = problem.mend
        if kind_of(folder) is None:
            if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
                mend = f"if it is on the Hugging Face Hub, write hub: {path} and its revision; else {mend}"
            mend = unexpanded(path) or mend
        report.add(
            (*at, "path"), found=f"{show(path)}: {problem.found}", expected=problem.expected, mend=mend, fault=True
        )


def _quantization(report: Report, at: KeyPath, model: dict[Any, Any], workdir: Path) -> None:
    method, key = model.get("quantization"), (*at, "quantization")
    if method is None:
        return
    hardware = report.section(("hardware",))
    if hardware.get("gpus", 0) == 0:
        report.add(
            key,
            found=f"{method} with hardware.gpus: 0",
            expected="a GPU: vLLM's CPU build quantizes nothing while loading",
            mend="delete quantization, or give hardware.gpus",
            reads=[("hardware", "gpus")],
        )
    if method == "fp8" and capability.lacks(hardware.get("compute_capability"), capability.FP8):
        report.add(
            key,
            found=f"fp8 with hardware.compute_capability: {show(hardware['compute_capability'])}",
            expected="8.9 or more (Ada, Hopper, Blackwell): older GPUs do not compute in fp8",
            mend="choose bitsandbytes, or another GPU",
            reads=[("hardware", "compute_capability")],
        )
    if method == "fp8" and model.get("dtype") == "float32":
        report.add(
            key,
            found="fp8 with dtype: float32",
            expected="dtype auto, bfloat16 or float16: vLLM's fp8 takes 16-bit activations only",
            mend="delete dtype",
            reads=[(*at, "dtype")],
        )
    path = model.get("path")
    own = model_config(resolve(path, workdir)).get("quantization_config") if isinstance(path, str) else None
    if own:
        kind = own.get("quant_method", "unnamed") if isinstance(own, dict) else "unnamed"
        report.add(
            key,
            found=f"{method} for a checkpoint that is quantized already ({kind})",
            expected="a 16-bit checkpoint",
            mend="delete quantization: the checkpoint's own is used by itself",
        )


def _dtype(report: Report, at: KeyPath, model: dict[Any, Any]) -> None:
    hardware = report.section(("hardware",))
    too_old = capability.lacks(hardware.get("compute_capability"), capability.BFLOAT16)
    if model.get("dtype") == "bfloat16" and hardware.get("gpus", 0) and too_old:
        report.add(
            (*at, "dtype"),
            found=f"bfloat16 with hardware.compute_capability: {show(hardware['compute_capability'])}",
            expected="8.0 or more (Ampere) for bfloat16",
            mend="delete dtype, so that the plan takes what this GPU has, or choose another GPU",
            reads=[("hardware", "compute_capability"), ("hardware", "gpus")],
        )


def _thinking(report: Report, at: KeyPath, model: dict[Any, Any]) -> None:
    thinks, end, arguments = (model.get(key) for key in ("enable_thinking", "think_end_token", "chat_template_args"))
    if thinks is True and end is None:
        report.add(
            (*at, "enable_thinking"),
            found="true without think_end_token",
            expected="think_end_token too: what stands before it is no answer",
            mend='add think_end_token: "</think>", or what else ends the thoughts of this model',
            reads=[(*at, "think_end_token")],
        )
    for name in arguments if isinstance(arguments, Mapping) else ():
        if name == "enable_thinking":
            report.add(
                (*at, "chat_template_args", name),
                found="enable_thinking among the arguments",
                expected="enable_thinking as a key of the model: lm-eval sets it from there",
                mend=f"move it out: models.{at[-1]}.enable_thinking",
            )
        elif name in RENDERING:
            report.add(
                (*at, "chat_template_args", name),
                found=f"{name}, which lm-eval gives itself",
                expected="variables of the template alone",
                mend=f"delete {name}",
            )
    told = [key for key in ("enable_thinking", "chat_template_args") if model.get(key) is not None]
    suites = [("suites", name) for name in _asked(report, model)]
    if told and not any(_has_template(report.section(suite)) for suite in suites):
        report.add(
            (*at, told[0]),
            found=f"{told[0]} where no suite of this model has apply_chat_template",
            expected="a chat template, which alone reads it",
            mend=f"add apply_chat_template: true to a suite, or delete {told[0]}",
            reads=[(*suite, "apply_chat_template") for suite in suites],
        )


def _asked(report: Report, model: dict[Any, Any]) -> list[str]:
    """Names of the suites that a model runs."""
    known, chosen = [str(name) for name in report.names("suites")], model.get("suites")
    return [name for name in known if not isinstance(chosen, list) or name in chosen]


def _has_template(suite: Mapping[Any, Any]) -> bool:
    tasks = suite.get("tasks")
    entries = [entry for entry in tasks if isinstance(entry, Mapping)] if isinstance(tasks, list) else []
    return any(part.get("apply_chat_template") for part in (suite, *entries))


def _suites_of(report: Report, at: KeyPath, model: dict[Any, Any]) -> None:
    known = [str(name) for name in report.names("suites")]
    chosen = model.get("suites")
    if not known or not isinstance(chosen, list):
        return
    for index, name in enumerate(chosen):
        if name not in known:
            near = nearest(name, known)
            report.add(
                (*at, "suites", index),
                found=show(name),
                expected=f"a suite: {listing(known)}",
                mend=f"write {near}" if near else "choose one of them, or define it under suites",
            )
        elif name in chosen[:index]:
            report.add(
                (*at, "suites", index),
                found=f"{name} for the second time",
                expected="each suite once",
                mend="delete the second",
            )
