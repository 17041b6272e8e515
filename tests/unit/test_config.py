"""Configurations: what is refused and how it is said, what a run's name depends on, and what is generated."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reproval import config as module
from reproval.config import ConfigError, load, merge, runs
from reproval.folders import model_digest, tree_digest
from reproval.problems import Problem
from reproval.settings import Config, Generation, TaskEntry

ROOT = Path(__file__).resolve().parents[2]
BROKEN = yaml.safe_load((Path(__file__).parent / "broken_configs.yaml").read_text(encoding="utf-8"))
COMMIT = "1cfa9a7208912126459214e8b04321603b3df60c"


def safetensors(path: Path, data: bytes = b"\0" * 8) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def model_folder(folder: Path, without: str = "", **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    safetensors(folder / "model.safetensors")
    if without:
        (folder / without).unlink()
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that broken_configs.yaml names."""
    work = tmp_path_factory.mktemp("work")
    models = work / "models"
    model_folder(models / "good")
    model_folder(models / "mute", without="tokenizer.json")
    model_folder(models / "nested" / "checkpoint-100")
    model_folder(models / "awq", quantization_config={"quant_method": "awq"})
    (model_folder(models / "pickled", without="model.safetensors") / "pytorch_model.bin").write_bytes(b"")
    shards = model_folder(models / "shards")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    pointer = model_folder(models / "pointer") / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    cut = model_folder(models / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    adapter = model_folder(models / "adapter")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    (models / "empty").mkdir()
    (work / "empty").mkdir()
    (work / "tasks").mkdir()
    (work / "tasks" / "mine.yaml").write_text("task: mine\n")
    return work


def read(text: str, workdir: Path, command_line: dict[str, Any] | None = None) -> Config:
    """Load one configfile's text as Snakemake would hand it over."""
    file = workdir / "config.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        data = yaml.load(text, Loader=yaml.FullLoader)  # noqa: S506 - Snakemake's own choice of loader
    except yaml.YAMLError:
        data = {}
    merged = merge(data if isinstance(data, dict) else {}, command_line or {})
    return load(merged, [Path("config.yaml")], ROOT, workdir)


def refusal(text: str, workdir: Path, command_line: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, workdir, command_line)
    return str(caught.value)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case["name"])
def test_broken_configuration_is_refused_with_its_message(case: dict[str, Any], workdir: Path) -> None:
    said = refusal(case["config"], workdir, case.get("command_line"))
    heading, _, problems = said.partition("\n\n")
    assert problems == case["says"].rstrip("\n")
    count = len(re.findall(r"^\S", problems, re.MULTILINE))
    assert heading == f"The configuration has {count} problem{'s' * (count != 1)}; nothing was started."


GOOD = """
models:
  own: {path: models/good}
suites:
  core:
    tasks: [mmlu]
"""


def test_error_names_the_file_and_line_that_gave_the_value(workdir: Path) -> None:
    (workdir / "first.yaml").write_text(GOOD + "seed: -1\npolicy: auto\n")
    (workdir / "second.yaml").write_text("\n\nmodels:\n  own: {dtype: f32}\npolicy: none\n")
    files = [Path("first.yaml"), Path("second.yaml")]
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, yaml.safe_load((workdir / file).read_text()))
    with pytest.raises(ConfigError) as caught:
        load(merged, files, ROOT, workdir)
    assert [(problem.place, problem.key) for problem in caught.value.problems] == [
        ("first.yaml:7", "seed"),
        ("second.yaml:4", "models.own.dtype"),
        ("second.yaml:5", "policy"),
    ]


def test_missing_configfile_is_named(workdir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, [Path("absent.yaml")], ROOT, workdir)
    (problem,) = caught.value.problems
    assert (problem.place, problem.found) == ("absent.yaml", "No such file or directory")


def test_text_inside_braces_of_the_command_line_gets_its_type(workdir: Path) -> None:
    cli = pytest.importorskip("snakemake.cli", reason="Snakemake is not installed")
    given_values = cli.parse_config(
        [
            "hardware={gpus: 1, gpu_memory_gib: 79.6, compute_capability: '9.0'}",
            "suites={core: {num_fewshot: 5, generation: {do_sample: true, temperature: 0.5, until: ['1', x]}}}",
            "batch_invariant=true",
            "seed=7",
        ]
    )
    config = read(GOOD, workdir, given_values)
    assert config.suites["core"].num_fewshot == 5
    assert config.suites["core"].generation == {"do_sample": True, "temperature": 0.5, "until": ["1", "x"]}
    assert config.hardware.gpus == 1
    assert config.hardware.gpu_memory_gib == 79.6
    assert config.hardware.compute_capability == "9.0"
    assert config.batch_invariant is True
    assert config.seed == 7


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_json_configfile_is_read_as_snakemake_reads_it(
    loader: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reproval.strictyaml._Loader", getattr(yaml, loader, yaml.SafeLoader))
    good = json.dumps(yaml.safe_load(GOOD), indent="\t")
    (workdir / "config.json").write_text(good)
    assert load(json.loads(good), [Path("config.json")], ROOT, workdir).models["own"].path == "models/good"
    broken = good.replace('"tasks"', '"limit": "3",\n"tasks"')
    (workdir / "config.json").write_text(broken)
    with pytest.raises(ConfigError, match=r"(?m)^config\.json:\d+: suites\.core\.limit$") as caught:
        load(json.loads(broken), [Path("config.json")], ROOT, workdir)
    assert len(caught.value.problems) == 1


TOKEN = "hf_" + "SeCrEt" * 6
PLACES = [
    "models: {own: {path: models/good, TOKEN: 1}}\nsuites: {core: {tasks: [mmlu]}}",
    "models: {own: {path: TOKEN}}\nsuites: {core: {tasks: [mmlu]}}",
    "models: {TOKEN: {path: models/good}}\nsuites: {core: {tasks: [mmlu]}}",
    "models: {own: {hub: a/TOKEN}}\nsuites: {core: {tasks: [mmlu]}}",
    "models: {own: {hub: a/b, revision: TOKEN}}\nsuites: {core: {tasks: [mmlu]}}",
    "models: {own: {path: models/good}}\nsuites: {core: {tasks: [TOKEN, {task: TOKEN}], include_path: x TOKEN}}",
    "models: {own: {path: models/good}}\nsuites: {core: {tasks: [mmlu], system_instruction: say TOKEN}}",
    "models: {own: {path: models/good}}\nsuites: {core: {tasks: [mmlu], generation: {until: [TOKEN]}}}",
    "models: {own: {path: models/good}}\nsuites: {core: {tasks: [mmlu]}}\nseed: TOKEN\nTOKEN: TOKEN",
    "models: {own: {path: models/good}}\nsuites: {core: {tasks: [mmlu]}}\ncontainer: {image: 'docker://u:TOKEN@h'}",
    "a: 1\nTOKEN: : x",
    "a: *TOKEN",
    "a: !TOKEN x",
    "TOKEN: 1\nTOKEN: 2",
    "- TOKEN",
]


@pytest.mark.parametrize("text", PLACES)
def test_secret_is_refused_and_never_shown(text: str, workdir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text.replace("TOKEN", TOKEN), workdir)
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in f"{error} {error!r} {error.args}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def all_keys() -> list[tuple[str, str]]:
    sections = {"Config": module.schema()} | module.schema()["$defs"]
    return [(name, key) for name, section in sections.items() for key in section.get("properties", {})]


AT: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Config": lambda data: data,
    "ModelConfig": lambda data: data["models"]["own"],
    "SuiteConfig": lambda data: data["suites"]["core"],
    "TaskEntry": lambda data: data["suites"]["core"]["tasks"][0],
    "Generation": lambda data: data["suites"]["core"]["generation"],
    "HardwareConfig": lambda data: data["hardware"],
    "ContainerConfig": lambda data: data["container"],
    "ExportConfig": lambda data: data["export"],
}


@pytest.mark.parametrize(("section", "key"), all_keys(), ids=lambda value: value)
def test_misspelling_of_any_key_is_answered_with_the_key(section: str, key: str, workdir: Path) -> None:
    digest = "a" * 64
    data: dict[str, Any] = {
        "models": {"own": {"path": "models/good"}},
        "suites": {"core": {"tasks": [{"task": "mmlu"}], "generation": {}}},
        "hardware": {},
        "container": {"image": f"docker://a/b@sha256:{digest}"},
        "export": {},
    }
    target = AT[section](data)
    misspelt = key[:1] + key[2:]
    target[misspelt] = target.pop(key, 1)
    with pytest.raises(ConfigError) as caught:
        load(data, [], ROOT, workdir)
    assert [problem.mend for problem in caught.value.problems] == [f"write {key}"]


def test_every_key_has_a_description() -> None:
    sections = {"Config": module.schema()} | module.schema()["$defs"]
    assert set(sections) == set(AT)
    for name, section in sections.items():
        assert section.get("description"), name
        for key, entry in section["properties"].items():
            assert entry.get("description") or "$ref" in entry, f"{name}.{key}"


def test_schema_and_readme_are_what_the_models_say() -> None:
    written = (ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8")
    assert written == module.schema_text(), "python -m reproval.config schema > workflow/schemas/config.schema.yaml"
    readme = (ROOT / "config/README.md").read_text(encoding="utf-8")
    assert module.keys_text() in readme, "put the output of `python -m reproval.config keys` into config/README.md"
    jsonschema.Draft202012Validator.check_schema(module.schema())


@pytest.mark.parametrize("file", ["config/config.yaml", "config/demo/config.yaml"])
def test_configurations_that_ship_are_valid(file: str, tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    jsonschema.validate(data, module.schema())
    for model in data["models"].values():
        if "path" in model and not (tmp_path / model["path"]).exists():
            # `make demo` puts the weights there.
            model_folder(tmp_path / model["path"])
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text((ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
    config = load(data, [Path(file)], ROOT, tmp_path)
    assert len(runs(config, ROOT, tmp_path, "lock:0")) == len(data["models"])


def test_examples_of_the_readme_are_valid(workdir: Path) -> None:
    text = (ROOT / "config/README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        data = merge(yaml.safe_load(GOOD), yaml.safe_load(example))
        jsonschema.validate(data, module.schema())
        for model in data["models"].values():
            if "path" in model and not (workdir / model["path"]).exists():
                model_folder(workdir / model["path"])
        for suite in data["suites"].values():
            if "include_path" in suite:
                (workdir / suite["include_path"]).mkdir(exist_ok=True)
                (workdir / suite["include_path"] / "task.yaml").write_text("task: x\n")
        read(yaml.safe_dump(data), workdir)


def test_check_by_hand(workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(workdir)
    Path("good.yaml").write_text(GOOD)
    Path("over.yaml").write_text("seed: none\n")
    assert module.main(["check", "good.yaml"]) == 0
    assert capsys.readouterr().out == "OK\n"
    assert module.main(["check", "good.yaml", "over.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'over.yaml:1: seed\n  found:    "none"\n' in captured.err
    assert module.main(["check", "nowhere.yaml"]) == 2


# --- whatever is given --------------------------------------------------------------------------------------------

LONG = st.sampled_from(["x" * 5000, "a/" * 3000, "\0", "models/\0", "~root", "$HOME", "\n", "é" * 200])
SCALARS = LONG | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
WHOLE: dict[str, Any] = {
    "models": {"own": {"path": "models/good", "dtype": "float32", "suites": ["core"]}, "hub": {"hub": "a/b"}},
    "suites": {
        "core": {
            "tasks": ["mmlu", {"task": "gsm8k", "num_fewshot": 5, "generation": {"until": ["Q"], "temperature": 0.5}}],
            "include_path": "tasks",
            "limit": 3,
            "generation": {"do_sample": True, "temperature": 0.7},
        }
    },
    "hardware": {"gpus": 1, "gpu_memory_gib": 80.0, "compute_capability": "9.0"},
    "container": {"image": "docker://a/b:c", "sif_sha256": "0" * 64},
    "tiers": "config/tiers.yaml",
    "policy": "auto",
    "store": "resources",
}


def replaced(data: Any, draw: Callable[[Any], Any], value: Any) -> Any:
    """A copy of the data in which one entry, somewhere, is another value."""
    if isinstance(data, dict) and data and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(data)))
        return data | {key: replaced(data[key], draw, value)}
    if isinstance(data, list) and data and draw(st.integers(0, 5)):
        index = draw(st.integers(0, len(data) - 1))
        return [*data[:index], replaced(data[index], draw, value), *data[index + 1 :]]
    return value


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_but_a_config_error_is_raised(workdir: Path, data: st.DataObject) -> None:
    merged = replaced(WHOLE, data.draw, data.draw(ANYTHING))
    problems: tuple[Problem, ...] = ()
    try:
        config = load(merged if isinstance(merged, dict) else {}, [], ROOT, workdir)
        assert runs(config, ROOT, workdir, "lock:0")
    except ConfigError as error:
        problems = error.problems
    assert all(problem.found and problem.expected and problem.mend for problem in problems)


@given(model=st.text(max_size=80), suite=st.text(max_size=80), task=st.text(max_size=150))
@settings(max_examples=150, deadline=None)
def test_no_name_leaves_its_folder(workdir: Path, model: str, suite: str, task: str) -> None:
    data = {"models": {model: {"path": "models/good"}}, "suites": {suite: {"tasks": [task]}}}
    try:
        (run,) = runs(load(data, [], ROOT, workdir), ROOT, workdir, "lock:0")
    except ConfigError:
        return
    root = Path("/results")
    for parts in ((run.name,), (run.name, run.units[0].suite), (run.name, run.units[0].suite, run.units[0].task)):
        folder = root.joinpath(*parts)
        assert Path(re.sub(r"/+", "/", str(folder))).parts == ("/", "results", *parts)
        assert not any(part in (".", "..") or part.startswith((".", "-")) or len(part) > 128 for part in parts)


# --- runs -----------------------------------------------------------------------------------------------------------


def config_of(workdir: Path, **changes: Any) -> Config:
    data: dict[str, Any] = {
        "models": {"a": {"hub": "Qwen/Qwen3-4B", "revision": COMMIT}, "b": {"path": "models/good"}},
        "suites": {"core": {"tasks": ["mmlu", "hellaswag"], "num_fewshot": 5}, "mine": {"tasks": ["gsm8k"]}},
        "hardware": {"gpus": 1, "gpu_memory_gib": 80.0},
    }
    return load(merge(data, changes), [], ROOT, workdir)


def names_of(workdir: Path, environment: str = "lock:0", **changes: Any) -> dict[str, str]:
    config = config_of(workdir, **changes)
    return {run.model_name: run.name for run in runs(config, ROOT, workdir, environment)}


DECIDING: list[dict[str, Any]] = [
    {"models": {"a": {"revision": "0" * 40}}},
    {"models": {"a": {"hub": "Qwen/Qwen3-8B"}}},
    {"models": {"a": {"dtype": "float16"}}},
    {"models": {"a": {"quantization": "bitsandbytes"}}},
    {"models": {"a": {"max_model_len": 1024}}},
    {"models": {"a": {"trust_remote_code": True}}},
    {"models": {"a": {"think_end_token": "</think>"}}},
    {"models": {"a": {"suites": ["core"]}}},
    {"suites": {"core": {"num_fewshot": 4}}},
    {"suites": {"core": {"limit": 10}}},
    {"suites": {"core": {"limit": 0.5}}},
    {"suites": {"core": {"apply_chat_template": True}}},
    {"suites": {"core": {"apply_chat_template": True, "fewshot_as_multiturn": False}}},
    {"suites": {"core": {"system_instruction": "Think."}}},
    {"suites": {"core": {"generation": {"max_gen_toks": 8}}}},
    {"suites": {"core": {"include_path": "tasks"}}},
    {"suites": {"core": {"tasks": ["mmlu"]}}},
    {"suites": {"core": {"tasks": ["mmlu", {"task": "hellaswag", "num_fewshot": 0}]}}},
    {"suites": {"more": {"tasks": ["mmlu"]}}},
    {"seed": 1},
    {"batch_invariant": True},
]
INDIFFERENT: list[dict[str, Any]] = [
    {"hardware": {"gpus": 4, "gpu_memory_gib": 24.0, "cpus": 9, "host_memory_gib": 99.0, "gpu_name": "x"}},
    {"models": {"c": {"path": "models/awq"}}},
    {"models": {"a": {"gated": True}}},
    {"models": {"a": {"suites": ["mine", "core"]}}},
    {"suites": {"core": {"tasks": ["hellaswag", "mmlu"]}}},
    {"suites": {"core": {"unsafe_code": True}}},
    {"suites": {"core": {"generation": {}}}},
    {"suites": {"core": {"generation": {"top_p": None}}}},
    {"policy": "published"},
    {"store": "elsewhere"},
]


def test_name_changes_with_everything_that_decides_scores(workdir: Path) -> None:
    names = [names_of(workdir, **changes)["a"] for changes in [{}, *DECIDING]]
    names.append(names_of(workdir, environment="lock:1")["a"])
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"a-[0-9a-f]{12}", name) for name in names)


@pytest.mark.parametrize("changes", INDIFFERENT, ids=str)
def test_name_stays_with_everything_else(changes: dict[str, Any], workdir: Path) -> None:
    before, after = names_of(workdir), names_of(workdir, **changes)
    assert {name: after[name] for name in before} == before


def test_name_does_not_depend_on_the_order_of_keys(workdir: Path) -> None:
    config = config_of(workdir)
    turned = Config(models=dict(reversed(config.models.items())), suites=dict(reversed(config.suites.items())))
    assert {run.name for run in runs(turned, ROOT, workdir, "x")} == {
        run.name for run in runs(config, ROOT, workdir, "x")
    }


def test_identity_is_json_without_places(workdir: Path) -> None:
    for run in runs(config_of(workdir, suites={"core": {"include_path": "tasks"}}), ROOT, workdir, "lock:0"):
        text = json.dumps(run.identity)
        assert str(workdir) not in text
        assert "models/good" not in text


def test_units_have_the_suites_settings_under_their_own(workdir: Path) -> None:
    text = """
models: {own: {path: models/good}}
suites:
  first:
    include_path: tasks
    unsafe_code: true
    num_fewshot: 5
    limit: 10.0
    generation: {max_gen_toks: 64, until: [Q]}
    tasks:
      - plain
      - {task: own, num_fewshot: 0, limit: null, generation: {until: null, min_tokens: 1}}
      - {task: none, generation: null}
  second:
    tasks: [plain]
"""
    (run,) = runs(read(text, workdir), ROOT, workdir, "lock:0")
    assert [unit.name for unit in run.units] == ["first/plain", "first/own", "first/none", "second/plain"]
    plain, own, none, second = (unit.settings for unit in run.units)
    assert (plain.num_fewshot, plain.limit, plain.generation) == (5, 10, {"max_gen_toks": 64, "until": ["Q"]})
    assert isinstance(plain.limit, int)
    assert (own.num_fewshot, own.limit, own.generation) == (0, None, {"max_gen_toks": 64, "min_tokens": 1})
    assert (none.num_fewshot, none.generation) == (5, None)
    assert second.model_dump(exclude_none=True) == {}
    assert (run.units[0].include_path, run.units[0].unsafe_code) == ("tasks", True)
    assert (run.units[3].include_path, run.units[3].unsafe_code) == (None, False)


def test_include_path_is_found_beside_the_workflow(workdir: Path, tmp_path: Path) -> None:
    base = tmp_path / "workflow"
    (base / "mine").mkdir(parents=True)
    (base / "mine" / "task.yaml").write_text("task: x\n")
    (base / "config").mkdir()
    shutil.copy(ROOT / "config" / "tiers.yaml", base / "config")
    data = {"models": {"m": {"path": "models/good"}}, "suites": {"s": {"tasks": ["x"], "include_path": "mine"}}}
    (run,) = runs(load(data, [], base, workdir), base, workdir, "lock:0")
    assert run.units[0].include_path == str(base / "mine")
    assert run.units[0].include_sha256 == tree_digest(base / "mine")


def test_name_follows_task_files_and_weights_but_not_their_place(tmp_path: Path) -> None:
    def name(work: Path) -> str:
        data = {"models": {"m": {"path": "model"}}, "suites": {"s": {"tasks": ["x"], "include_path": "tasks"}}}
        (run,) = runs(load(data, [], ROOT, work), ROOT, work, "lock:0")
        return run.name

    def make(work: Path) -> Path:
        model_folder(work / "model")
        (work / "tasks" / "deep").mkdir(parents=True)
        (work / "tasks" / "x.yaml").write_text("task: x\n")
        (work / "tasks" / "deep" / "data.jsonl").write_text("{}\n")
        return work

    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    first = name(one)
    assert name(two) == first
    (two / "tasks" / "__pycache__").mkdir()
    (two / "tasks" / "__pycache__" / "notes").write_bytes(b"1")
    (two / "tasks" / "utils.pyc").write_bytes(b"1")
    (two / "tasks" / ".x.yaml.swp").write_bytes(b"1")
    (two / "model" / ".cache").mkdir()
    (two / "model" / ".cache" / "lock").write_text("")
    assert name(two) == first
    (two / "tasks" / "deep" / "data.jsonl").write_text('{"a": 1}\n')
    assert name(two) != first
    safetensors(one / "model" / "model.safetensors", b"\1" * 8)
    assert name(one) != first


def test_large_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    size = 20 * 1024**2
    one, two = model_folder(tmp_path / "one"), model_folder(tmp_path / "two")
    safetensors(one / "model.safetensors", b"\0" * size)
    safetensors(two / "model.safetensors", b"\0" * size)
    assert model_digest(one) == model_digest(two)
    safetensors(two / "model.safetensors", b"\0" * (size // 2) + b"\1" * (size - size // 2))
    assert model_digest(one) != model_digest(two)


def test_thousand_models_by_a_hundred_tasks_are_quick(workdir: Path) -> None:
    models = "\n".join(f"  m{number}: {{hub: org/m{number}, revision: {number:040x}}}" for number in range(1000))
    tasks = "\n".join(f"      - task_{number}" for number in range(100))
    # Digits alone would be numbers to YAML.
    models = re.sub(r"revision: (\w+)", r"revision: 'a\1'", models).replace("'a0", "'a")
    text = f"models:\n{models}\nsuites:\n  core:\n    include_path: tasks\n    tasks:\n{tasks}\n"
    begin = time.monotonic()
    made = runs(read(text, workdir), ROOT, workdir, "lock:0")
    assert time.monotonic() - begin < 8
    assert len({run.name for run in made}) == 1000
    assert all(len(run.units) == 100 for run in made)


def test_generation_keys_are_settings_of_a_task() -> None:
    assert "generation" in TaskEntry.model_fields
    accepted = Generation(until=["a"], temperature=0.5, top_k=3, do_sample=True).model_dump(exclude_none=True)
    assert TaskEntry(task="x", generation=accepted).generation == accepted


def test_documented_commands_part_the_target_from_the_configuration() -> None:
    """Snakemake takes every word after --configfile for a file, up to the next option."""
    swallowed = re.compile(r"--configfile \S+ (?!\s*#|-)\w+")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        commands = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
        assert [line for line in commands if swallowed.search(line)] == [], path.name


def test_a_misspelt_lever_is_found_before_anything_is_counted(workdir: Path) -> None:
    text = (ROOT / "config" / "tiers.yaml").read_text()
    (workdir / "mine.yaml").write_text(text.replace("enforce_eager: true", "enforce_eagre: true"))
    data = {"models": {"m": {"path": "models/good"}}, "suites": {"s": {"tasks": ["x"]}}, "tiers": "mine.yaml"}
    with pytest.raises(
        ConfigError, match=r"mine\.yaml:\d+: .*enforce_eagre: an unknown key(.|\n)*did you mean enforce_eager"
    ):
        load(data, [], ROOT, workdir)
