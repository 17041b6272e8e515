"""What a configuration must satisfy beyond the types of its keys: rules between keys, and between keys and files.

Every check reads the merged configuration through a `Report`, which keeps it silent about what is reported already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reproval.folders import FolderError, check_model_folder, kind_of, model_config, resolve, walk
from reproval.problems import SECRET, Report, listing, lookup, nearest, show
from reproval.settings import Config, HardwareConfig, TaskSettings
from reproval.strictyaml import KeyPath, YamlError, read

COMMIT = re.compile(r"[0-9a-f]{40}")
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._()+-]{0,127}")
DIGEST = re.compile(r"(docker|oras)://(?P<name>[^\s@]+)@sha256:[0-9a-f]{64}")
# Windows, which a shared folder or WSL brings in, opens a device under these names whatever the suffix.
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(10))}
# Ada; below it vLLM keeps fp8 weights only and computes in 16 bit, which gives other scores.
FP8_CAPABILITY = (8, 9)
BFLOAT16_CAPABILITY = (8, 0)
BATCH_INVARIANT_CAPABILITY = (8, 0)


def check(report: Report, base: Path, workdir: Path) -> None:
    """Add to the report what is wrong. Reads the files that the configuration names; raises nothing."""
    _numbers(report)
    for section in ("models", "suites"):
        _names(report, section)
    folders: dict[Path, FolderError | None] = {}
    for name in report.names("models"):
        _model(report, ("models", name), workdir, folders)
    for name in report.names("suites"):
        _suite(report, ("suites", name), base, workdir)
    _hardware(report)
    _container(report, workdir)
    _tiers(report, base, workdir)
    _store(report, workdir)


# --- the whole ------------------------------------------------------------------------------------------------------


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield (*path, key), key
            yield from _leaves(entry, (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _leaves(entry, (*path, index))
    else:
        yield path, value


def secrets(report: Report) -> None:
    """Add every key and value that looks like an access token. To be called first: nothing else is said of it."""
    for path, value in _leaves(report.merged):
        if isinstance(value, str) and SECRET.search(value):
            report.add(
                path,
                found="what looks like an access token (not shown)",
                expected="no secret in a configuration: it is copied into results, reports and bundles",
                mend="delete it here, revoke it if the file was shared, and set HF_TOKEN in the environment instead",
                fault=True,
            )


def _numbers(report: Report) -> None:
    for path, value in _leaves(report.merged):
        if isinstance(value, float) and not math.isfinite(value):
            report.add(
                path, found=show(value), expected="a finite number", mend="write a number", reads=[path], fault=True
            )
        written = report.written(path) or ""
        if type(value) in (int, float) and re.fullmatch(r"[-+]?(0[0-9_]+|.*:.*)", written):
            report.add(
                path,
                found=f"{written}, which YAML reads as {show(value)}: a 0 in front means octal, a colon base 60",
                expected="a decimal number",
                mend=f"write {show(value)}, or the number that was meant",
                reads=[path],
            )


def _names(report: Report, section: str) -> None:
    names = [name for name in report.names(section) if isinstance(name, str)]
    for name in names:
        _device(report, (section, name), name)
    for first, second in _same_but_for_case(names):
        report.add(
            (section, second),
            found=f"{second} beside {first}",
            expected="names that differ in more than upper and lower case, since each becomes a folder",
            mend="rename one of them",
        )


def _same_but_for_case(names: list[str]) -> Iterator[tuple[str, str]]:
    first: dict[str, str] = {}
    for name in names:
        if first.setdefault(name.casefold(), name) != name:
            yield first[name.casefold()], name


def _device(report: Report, path: KeyPath, name: str) -> None:
    if name.split(".")[0].casefold() in DEVICES or name.endswith("."):
        report.add(
            path,
            found=show(name),
            expected="a name that every file system takes for a folder",
            mend="do not end it with a dot" if name.endswith(".") else f"choose another name, such as {name}-1",
        )


# --- models ---------------------------------------------------------------------------------------------------------


def _model(report: Report, at: KeyPath, workdir: Path, folders: dict[Path, FolderError | None]) -> None:
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
            mend = _unexpanded(path) or mend
        report.add(
            (*at, "path"), found=f"{show(path)}: {problem.found}", expected=problem.expected, mend=mend, fault=True
        )


def _unexpanded(path: str) -> str | None:
    if path.startswith("~") or "$" in path:
        return "write the whole path: ~ and $VARIABLES are not expanded, as they differ inside a container"
    return None


def _quantization(report: Report, at: KeyPath, model: dict[Any, Any], workdir: Path) -> None:
    method, key = model.get("quantization"), (*at, "quantization")
    if method is None:
        return
    hardware = report.section(("hardware",))
    gpus, capability = hardware.get("gpus", 0), _capability(hardware)
    if gpus == 0:
        report.add(
            key,
            found=f"{method} with hardware.gpus: 0",
            expected="a GPU: vLLM's CPU build quantizes nothing while loading",
            mend="delete quantization, or give hardware.gpus",
            reads=[("hardware", "gpus")],
        )
    if method == "fp8" and capability is not None and capability < FP8_CAPABILITY:
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
    capability = _capability(hardware)
    if (
        model.get("dtype") == "bfloat16"
        and hardware.get("gpus", 0)
        and capability is not None
        and capability < BFLOAT16_CAPABILITY
    ):
        report.add(
            (*at, "dtype"),
            found=f"bfloat16 with hardware.compute_capability: {show(hardware['compute_capability'])}",
            expected="8.0 or more (Ampere) for bfloat16",
            mend="delete dtype, so that the plan takes what this GPU has, or choose another GPU",
            reads=[("hardware", "compute_capability"), ("hardware", "gpus")],
        )


def _capability(hardware: Mapping[Any, Any]) -> tuple[int, int] | None:
    value = hardware.get("compute_capability")
    if not isinstance(value, str):
        return None
    major, minor = value.split(".")
    return int(major), int(minor)


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


# --- suites ---------------------------------------------------------------------------------------------------------


def _suite(report: Report, at: KeyPath, base: Path, workdir: Path) -> None:
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
        _device(report, at, task)
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
        mend = _unexpanded(value) or ("write the folder that the file is in" if kind else where)
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


# --- hardware, container, files -------------------------------------------------------------------------------------


def _hardware(report: Report) -> None:
    hardware = report.section(("hardware",))
    gpus = hardware.get("gpus", HardwareConfig.model_fields["gpus"].default)
    if gpus and hardware.get("gpu_memory_gib") is None:
        report.add(
            ("hardware", "gpu_memory_gib"),
            found=f"nothing, with gpus: {gpus}",
            expected="the memory of one GPU in GiB: the plan is made before a GPU is asked for",
            mend="divide what `nvidia-smi --query-gpu=memory.total --format=csv` shows in MiB by 1024",
            reads=[("hardware", "gpu_memory_gib"), ("hardware", "gpus")],
        )
    if report.section(()).get("batch_invariant") is not True:
        return
    capability = _capability(hardware)
    if not gpus:
        report.add(
            ("batch_invariant",),
            found="true with hardware.gpus: 0",
            expected="a GPU: vLLM's CPU build has no batch-invariant kernels",
            mend="delete batch_invariant",
            reads=[("hardware", "gpus")],
        )
    elif capability is not None and capability < BATCH_INVARIANT_CAPABILITY:
        report.add(
            ("batch_invariant",),
            found=f"true with hardware.compute_capability: {show(hardware['compute_capability'])}",
            expected="compute capability 8.0 or more",
            mend="delete batch_invariant, or choose another GPU",
            reads=[("hardware", "compute_capability")],
        )


def _container(report: Report, workdir: Path) -> None:
    container = report.section(("container",))
    image, key = container.get("image"), ("container", "image")
    if not isinstance(image, str) or not image:
        return
    digest_of_sif = container.get("sif_sha256")
    if image.endswith((".sif", ".simg")) and "://" not in image:
        if kind_of(resolve(image, workdir)) != "file":
            report.add(
                key,
                found=f"{show(image)}: no such file",
                expected="an existing .sif file",
                mend=_unexpanded(image) or "correct the path (relative to the working directory), or build the image",
            )
        if digest_of_sif is None:
            report.add(
                ("container", "sif_sha256"),
                found="nothing",
                expected="the file's SHA-256: Snakemake does not notice when a .sif is replaced",
                mend=f"add sif_sha256: with the first column of `sha256sum {image}`",
                reads=[("container", "sif_sha256")],
            )
        return
    if digest_of_sif is not None:
        report.add(
            ("container", "sif_sha256"),
            found=f"sif_sha256 for {show(image)}",
            expected="sif_sha256 only for a .sif file; an image has its digest in its name",
            mend="delete sif_sha256",
        )
    _image(report, key, image)


def _image(report: Report, key: KeyPath, image: str) -> None:
    expected = "docker://NAME@sha256:DIGEST, oras://NAME@sha256:DIGEST, or a .sif file"
    match = DIGEST.fullmatch(image)
    if match and ":" not in match["name"].rpartition("/")[2]:
        return
    scheme, _, rest = image.rpartition("://")
    name, _, digest = rest.partition("@")
    if match:
        untagged = f"{scheme}://{name.rpartition(':')[0]}@{digest}"
        report.add(
            key,
            found=f"{show(image)}: a tag and a digest",
            expected=expected + "; Apptainer refuses both together",
            mend=f"write {untagged}",
        )
    elif scheme in ("", "docker", "oras") and re.fullmatch(r"[\w./:-]+", name) and not name.startswith(("/", ".")):
        tag = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        report.add(
            key,
            found=f"{show(image)}: a tag, which may be another image tomorrow" if not digest else show(image),
            expected=expected,
            mend=f"write {scheme or 'docker'}://{tag.rpartition(':')[0]}@ and what "
            f"`skopeo inspect --format '{{{{.Digest}}}}' docker://{tag}` or `crane digest {tag}` prints",
        )
    else:
        report.add(
            key,
            found=show(image),
            expected=expected,
            mend="pull it into a .sif file with `apptainer pull`, and name that with its sif_sha256",
        )


def _tiers(report: Report, base: Path, workdir: Path) -> None:
    top = report.section(())
    name = top.get("tiers", Config.model_fields["tiers"].default)
    policy = top.get("policy", Config.model_fields["policy"].default)
    if not isinstance(name, str) or not isinstance(policy, str):
        return
    if _braces(report, ("tiers",), name):
        return
    file, expected = resolve(name, workdir, base), "a file with `tiers` and `policies`, as config/tiers.yaml"
    reads: list[KeyPath] = [("tiers",)]
    try:
        data = read(file).data
    except (OSError, ValueError) as error:
        mend = _unexpanded(name) or "correct the path, or delete tiers for the file that comes with the workflow"
        found = f"{show(name)}: {getattr(error, 'strerror', error)}"
        report.add(("tiers",), found=found, expected=expected, mend=mend, reads=reads)
        return
    except YamlError as error:
        found = f"{show(name)}, line {error.line}: {error.found}"
        report.add(("tiers",), found=found, expected=expected, mend=error.mend, reads=reads)
        return
    policies = data.get("policies") if isinstance(data, Mapping) else None
    if not isinstance(policies, Mapping) or not policies:
        found = f"{show(name)} without policies"
        report.add(("tiers",), found=found, expected=expected, mend="name a file that has them", reads=reads)
    elif policy not in policies:
        near = nearest(policy, map(str, policies))
        report.add(
            ("policy",),
            found=show(policy),
            expected=f"a policy of {name}: {listing(map(str, policies))}",
            mend=f"write {near}" if near else "choose one of them, or add it to that file",
            reads=[*reads, ("policy",)],
        )


def _store(report: Report, workdir: Path) -> None:
    store = report.section(()).get("store")
    if not isinstance(store, str) or _braces(report, ("store",), store):
        return
    if _unexpanded(store) is not None or kind_of(resolve(store, workdir)) == "file":
        report.add(
            ("store",),
            found=show(store) + ("" if _unexpanded(store) else ": a file"),
            expected="a folder, which may still be missing",
            mend=_unexpanded(store) or "name another path",
        )


def _braces(report: Report, at: KeyPath, path: str) -> bool:
    """Whether a path that rules have among their files has braces, which is reported."""
    if not set("{}") & set(path):
        return False
    report.add(
        at,
        found=show(path),
        expected="a path without braces, which Snakemake takes for wildcards",
        mend="rename it, or reach it by a link of another name",
    )
    return True
