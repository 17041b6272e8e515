"""A bundle: the same bytes twice, every changed byte found and named, nothing secret, nothing outside its folder."""

from __future__ import annotations

import gzip
import html
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import examples
import numpy as np
import pytest
import requests
import synthetic
import yaml

from reproval import bundle, problems, scrub
from reproval.bundle_archive import SUMS, BundleError, check_folder, unpack, unpacked
from reproval.bundle_content import CONFIGURATION, SBOM, configuration, read_runs
from reproval.bundle_crate import CRATE, crate
from reproval.files import read_record, sha256_file, write_record
from reproval.records import Container, Evaluation, ModelManifest, StoredFile, UnitResult
from reproval.run_file import RunFile, model_key
from reproval.settings import ContainerConfig, ModelConfig, Run, TaskSettings, Unit

ROOT = Path(__file__).resolve().parents[2]
HOME = "/home/somebody/models/smollm2"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory after a run: results, a manifest, task files; the model lies in somebody's home folder."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tasks").mkdir()
    (folder / "tasks/capitals.yaml").write_text("task: capitals\n")
    made = synthetic.write_project(folder, synthetic.DEMO_MODELS[:1], synthetic.DEMO_TASKS)
    for path in made.evaluations:
        evaluation = read_record(path, Evaluation)
        units = [
            Unit(suite=u.suite, task=u.task, include_path="tasks", unsafe_code=False, settings=TaskSettings(limit=5))
            for u in evaluation.units
        ]
        run = Run(
            name=evaluation.run, model_name=evaluation.model, model=ModelConfig(path=HOME), units=units, identity={}
        )
        write_record(path.parent / "run.json", examples.run_file(run=run))
        write_record(path.parent / "plan.json", evaluation.plan)
    weights = StoredFile(path="model.safetensors", size_bytes=8, sha256="1" * 64)
    manifest = ModelManifest(model="smollm2-135m", source="local", folder=HOME, files=[weights], digest="2" * 64)
    write_record(folder / "resources/manifests/models/smollm2-135m-0.json", manifest)
    return folder


def make(project: Path, out: Path, base: Path = ROOT) -> str:
    results = next(project.rglob("runs")).parent
    evaluations = sorted(results.glob("runs/*/evaluation.json"))
    manifests = sorted((project / "resources/manifests").rglob("*.json"))
    return bundle.make(results, evaluations, manifests, base, project, out)


@pytest.fixture(scope="module")
def archive(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a workflow of three files, so that every byte can be tried."""
    base = tmp_path_factory.mktemp("base")
    (base / "workflow").mkdir()
    for name in ("Snakefile", "LICENSE", "workflow/rules.smk"):
        (base / name).write_text(f"{name}\n")
    out = tmp_path_factory.mktemp("bundle") / "bundle.zip"
    make(project, out, base)
    return out


def test_it_holds_what_another_machine_needs(project: Path, tmp_path: Path) -> None:
    make(project, tmp_path / "b.zip")
    unpack(tmp_path / "b.zip", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"configuration.yaml", "SHA256SUMS", "ro-crate-metadata.json", "workflow/Snakefile"} <= found
    assert {"workflow/envs/cpu.txt", "workflow/envs/gpu.txt", "manifests/models/smollm2-135m-0.json"} <= found
    assert any(name.startswith("task-files/") and name.endswith("/capitals.yaml") for name in found)
    assert any(name.endswith("/samples.jsonl.gz") for name in found)
    assert any(name.endswith("/plan.json") for name in found)
    asked = bundle.asked_by(tmp_path / "out", tmp_path)
    (suite,) = asked["suites"].values()
    assert suite["include_path"].startswith("out/task-files/")
    assert (tmp_path / suite["include_path"] / "capitals.yaml").exists()
    assert [task["task"] for task in suite["tasks"]] == [task.name for task in synthetic.DEMO_TASKS]
    assert all(task["limit"] == 5 for task in suite["tasks"])
    assert asked["models"]["smollm2-135m"]["path"] == "smollm2"
    assert "model.safetensors with SHA-256 1111" in str(bundle.weights_needed(tmp_path / "out", "smollm2-135m"))


def test_its_readme_marks_scores_that_a_lever_changed(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "project")
    path = next((tmp_path / "project").glob("results/tasks/*/demo.capitals-*/result.json"))
    write_record(path, read_record(path, UnitResult).model_copy(update={"score_levers": [synthetic.CAP]}))
    make(tmp_path / "project", tmp_path / "b.zip")
    unpack(tmp_path / "b.zip", tmp_path / "out")
    rows = [
        line for line in (tmp_path / "out/README.md").read_text(encoding="utf-8").splitlines() if "| demo |" in line
    ]
    assert {line.split(" | ")[1] for line in rows if "†" in line} == {"capitals"}
    assert len({line.split(" | ")[1] for line in rows if "†" not in line}) == 3


def test_it_holds_the_list_of_what_the_image_holds_byte_by_byte(project: Path, tmp_path: Path) -> None:
    """With its paths: they are the image's own."""
    listed = tmp_path / "cpu.cdx.json"
    listed.write_text('{"components": [{"name": "torch", "evidence": "/opt/reproval/.env/cpu/lib/python3.11/torch"}]}')
    results = next(project.rglob("runs")).parent
    evaluations = sorted(results.glob("runs/*/evaluation.json"))
    bundle.make(results, evaluations, [], ROOT, project, tmp_path / "b.zip", listed)
    unpack(tmp_path / "b.zip", tmp_path / "out")
    assert (tmp_path / "out" / SBOM).read_bytes() == listed.read_bytes()
    graph = json.loads((tmp_path / "out/ro-crate-metadata.json").read_text())["@graph"]
    (entity,) = [entity for entity in graph if entity["@id"] == SBOM]
    assert entity["encodingFormat"] == "application/vnd.cyclonedx+json"


def test_the_same_run_makes_the_same_bytes_whatever_the_times_of_its_files(project: Path, tmp_path: Path) -> None:
    first = make(project, tmp_path / "a.zip")
    shutil.copytree(project, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.json*"):
        path.touch()
        path.chmod(0o600)
    assert make(tmp_path / "copy", tmp_path / "b.zip") == first == sha256_file(tmp_path / "a.zip")


def test_no_path_of_the_machine_is_told(archive: Path, project: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            assert HOME.encode() not in opened.read(name), name
            assert str(project).encode() not in opened.read(name), name


def test_a_secret_stops_it_by_name(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = next(project.rglob("runs")).parent
    report = results / "report.md"
    assert not report.exists()
    report.write_text("fetched with hf_" + "a" * 30)
    try:
        with pytest.raises(BundleError, match=r"results/report\.md: holds something shaped like a token"):
            make(project, tmp_path / "b.zip")
        report.write_text("the password is correct-horse-battery")
        monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
        with pytest.raises(BundleError, match="MY_API_KEY"):
            make(project, tmp_path / "b.zip")
    finally:
        report.unlink()
    assert not (tmp_path / "b.zip").exists()


SECRET_VALUE = 'correct "horse" & bättery\\staple'


@pytest.mark.parametrize("written", [json.dumps, lambda x: json.dumps(x, ensure_ascii=False), html.escape, str])
def test_a_secret_is_found_as_a_file_writes_it(written: Callable[[str], str]) -> None:
    text = f"<p>{written(SECRET_VALUE)}</p>"
    assert scrub.own(text, {"MY_API_KEY": SECRET_VALUE}) == "the value of the environment variable MY_API_KEY"
    assert scrub.own(text, {"MY_API_KEY": "another secret"}) is None


@pytest.mark.parametrize(
    "token",
    [
        f"hf_{'aB3dE' * 4}",
        f"sk-proj-{'aB3_dE-f' * 3}",
        f"glpat-{'aB3dE' * 4}",
        f"AKIA{'A1B2' * 4}",
        f"my_ghp_{'aB3' * 12}",
    ],
)
def test_a_token_that_stops_a_bundle_is_refused_in_a_configuration_and_never_shown(token: str) -> None:
    assert scrub.leaks(token, {}) == "something shaped like a token"
    assert problems.SECRET.search(token)
    assert token[-8:] not in problems.redact(f"found {token} there")


TOKEN = b"hf_" + b"a" * 30


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.jsonl.gz", gzip.compress(TOKEN), "holds something shaped like a token"),
        ("samples.jsonl.gz", gzip.compress(TOKEN), "holds something shaped like a token"),
        ("data.jsonl.gz", TOKEN, "no gzip file"),
        ("data.jsonl.gz", gzip.compress(TOKEN)[:-9], "no gzip file"),
        ("Capitals.yaml", b"task: other", "two files of one name"),
        ("a\\b.yaml", b"task: other", "leads out"),
        (os.fsdecode(b"\xff.yaml"), b"task: other", "no bundle has"),
    ],
    ids=["token", "token in samples of a task", "no gzip", "cut gzip", "case", "backslash", "no UTF-8"],
)
def test_a_task_file_that_may_not_be_in_it_stops_it_by_name(
    project: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = project / "tasks" / name
    path.write_bytes(content)
    try:
        with pytest.raises(BundleError, match=said) as refused:
            make(project, tmp_path / "b.zip")
        assert repr(name)[1:-1] in str(refused.value)
    finally:
        path.unlink()
    assert not (tmp_path / "b.zip").exists()


def test_a_name_with_a_line_separator_comes_back(project: Path, tmp_path: Path) -> None:
    path = project / "tasks/a\u2028b.yaml"
    path.write_text("task: other\n", encoding="utf-8")
    try:
        make(project, tmp_path / "b.zip")
    finally:
        path.unlink()
    unpack(tmp_path / "b.zip", tmp_path / "out")
    check_folder(tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("a\u2028b.yaml"))) == 1


def test_a_bundle_says_what_runs_and_nothing_else(tmp_path: Path) -> None:
    asked = {
        "models": {"m": {"path": "x"}},
        "suites": {"s": {"tasks": ["mmlu"], "include_path": "task-files/s"}},
        "seed": 3,
        "repeats": 2,
        "batch_invariant": True,
    }
    others = {"margin": 0.9, "hardware": {"gpus": 8}, "store": "/elsewhere", "local_copy": "/tmp"}
    path = tmp_path / "unpacked" / CONFIGURATION
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(asked | others))
    found = bundle.asked_by(path.parent, tmp_path)
    assert found.keys() == asked.keys()
    assert found["suites"]["s"]["include_path"] == "unpacked/task-files/s"
    for outside in ("task-files/../..", "/etc", "tasks", "../task-files"):
        asked["suites"] = {"s": {"tasks": ["mmlu"], "include_path": outside}}
        path.write_text(yaml.safe_dump(asked))
        with pytest.raises(BundleError, match=r"suites\.s\.include_path: found .* expected a folder below task-files/"):
            bundle.asked_by(path.parent, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "models: expected the models by name"),
        (b"- models", "models: expected the models by name"),
        (b"suites: {s: {tasks: [mmlu]}}", "models: expected the models by name"),
        (b"models: {m: {path: x}}", "suites: expected the suites by name"),
        (b"{models: {m: {path: x}}, suites: [s]}", "suites: expected the suites by name"),
        (b"{models: {m: }, suites: {s: {tasks: [mmlu]}}}", "models: expected the models by name"),
        (b"{models: {m: {path: x}}, suites: {s: }}", "suites: expected the suites by name"),
        (b"models: [", "found no YAML"),
        (b"models: \xff", "found no YAML"),
    ],
)
def test_a_bundle_without_a_configuration_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / CONFIGURATION).write_bytes(text)
    with pytest.raises(BundleError, match=rf"{CONFIGURATION}: {said}"):
        bundle.asked_by(tmp_path, tmp_path)


@pytest.mark.parametrize("image", ["/home/alice/engine.sif", "images/engine.simg", "docker://r/n@sha256:" + "a" * 64])
def test_an_image_that_is_a_file_stays_where_it_is(image: str) -> None:
    run = examples.run_file(container=ContainerConfig(image=image))
    assert configuration([run], {}).get("container") == ({"image": image} if "://" in image else None)


def test_a_branch_is_bundled_as_the_commit_that_was_evaluated(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    hub = {"hub": "org/m", "revision": "main", "allow_floating": True}
    manifests = folder / "resources/manifests/models"
    for path in folder.rglob("run.json"):
        old = read_record(path, RunFile)
        run = old.run.model_copy(update={"model": ModelConfig(**hub), "identity": {"model": hub}})
        write_record(path, old.model_copy(update={"run": run}))
        # The other was staged for another configuration of that model.
        for name, commit in ((model_key(run), "c" * 40), ("smollm2-135m-00", "d" * 40)):
            kept = ModelManifest(
                model=run.model_name,
                source="hub",
                hub_id="org/m",
                revision=commit,
                folder="m",
                files=[],
                digest="2" * 64,
            )
            write_record(manifests / f"{name}.json", kept)
    make(folder, tmp_path / "bundle.zip", tmp_path / "none")
    with zipfile.ZipFile(tmp_path / "bundle.zip") as packed:
        (model,) = yaml.safe_load(packed.read(CONFIGURATION))["models"].values()
    assert {key: model.get(key) for key in hub} == {"hub": "org/m", "revision": "c" * 40, "allow_floating": None}


def test_every_run_names_the_images_that_it_was_made_in(tmp_path: Path) -> None:
    def model(name: str, digit: str) -> synthetic.Model:
        box = Container(image=f"docker://r/n@sha256:{digit * 64}", digest=None, sif_sha256=digit * 64, runtime=None)
        return synthetic.Model(name, provenance={"container": box})

    made = synthetic.write_project(tmp_path, [model("a", "1"), model("b", "2")], synthetic.DEMO_TASKS[:1], trace=False)
    for path in made.evaluations:
        write_record(path.parent / "run.json", examples.run_file())
    graph = crate({}, read_runs(made.results, made.evaluations))["@graph"]
    images = [entity["containerImage"] for entity in graph if entity["@type"] == "CreateAction"]
    assert images == [[{"@id": f"docker://r/n@sha256:{digit * 64}"}] for digit in "12"]
    assert sum(entity["@type"] == "ContainerImage" for entity in graph) == 2


def test_every_changed_byte_is_found_and_every_file_named(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        starts = [(info.filename, info.header_offset + 30 + len(info.filename)) for info in opened.infolist()]
        sizes = {info.filename: info.file_size for info in opened.infolist()}
    rng = np.random.default_rng(0)
    wrong = tmp_path / "wrong.zip"
    for name, start in starts:
        at = start + int(rng.integers(sizes[name]))
        wrong.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError) as refused:
            unpack(wrong, tmp_path / "out")
        assert name in str(refused.value)
    first_directory = data.index(b"PK\x01\x02")
    for at in [*range(60), *rng.integers(0, len(data), 60), *range(first_directory, first_directory + 120)]:
        wrong.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(BundleError, match=r"wrong\.zip"):
            unpack(wrong, tmp_path / "out")
    for cut in (data[:-1], data[: len(data) // 2], data + b"\0", b""):
        wrong.write_bytes(cut)
        with pytest.raises(BundleError, match=r"wrong\.zip"):
            unpack(wrong, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.zip"]


def _rewrite(archive: Path, out: Path, change: Callable[[zipfile.ZipFile], None]) -> Path:
    shutil.copy(archive, out)
    with zipfile.ZipFile(out, "a") as opened:
        change(opened)
    return out


def _link(opened: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    opened.writestr(info, "/etc/passwd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: z.writestr("../outside", "x"), "leads out"),
        (lambda z: z.writestr("/absolute", "x"), "leads out"),
        (lambda z: z.writestr("a/../../b", "x"), "leads out"),
        (lambda z: z.writestr("C:\\windows", "x"), "leads out"),
        (lambda z: z.writestr("SHA256SUMS2", "x"), "expected none"),
        (lambda z: z.writestr("Configuration.yaml", "x"), "two files of one name"),
        (lambda z: z.writestr("zeros", bytes(10**6), zipfile.ZIP_DEFLATED), "do not use it"),
        (_link, "a link"),
    ],
)
def test_what_no_bundle_has_is_refused_before_it_is_written(
    archive: Path, tmp_path: Path, change: Callable[[zipfile.ZipFile], None], said: str
) -> None:
    wrong = _rewrite(archive, tmp_path / "in/wrong.zip" if (tmp_path / "in").mkdir() is None else tmp_path, change)
    with pytest.raises(BundleError, match=said):
        unpack(wrong, tmp_path / "in/out")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["wrong.zip"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_unpacked_bundle_is_found_again_and_its_changes_too(archive: Path, tmp_path: Path) -> None:
    folder = unpacked(archive, tmp_path)
    assert unpacked(archive, tmp_path) == folder
    check_folder(folder)
    (folder / "configuration.yaml").write_text("models: {}")
    with pytest.raises(BundleError, match=r"configuration\.yaml"):
        check_folder(folder)


def test_the_crate_follows_the_profile(archive: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        crate = json.loads(opened.read(CRATE))
        names = set(opened.namelist())
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"]), "an @id twice"

    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            return [value["@id"]] if set(value) == {"@id"} else [x for v in value.values() for x in references(v)]
        return [x for v in value for x in references(v)] if isinstance(value, list) else []

    outside = {x for entity in crate["@graph"] for x in references(entity) if not x.startswith("http")}
    assert outside <= entities.keys()
    assert entities[CRATE]["about"] == {"@id": "./"}
    assert entities[CRATE]["conformsTo"][0] == {"@id": "https://w3id.org/ro/crate/1.1"}
    root = entities["./"]
    assert {"name", "description", "datePublished", "license", "mainEntity", "hasPart", "mentions"} <= root.keys()
    assert {"@id": "https://w3id.org/ro/wfrun/workflow/0.5"} in root["conformsTo"]
    workflow = entities[root["mainEntity"]["@id"]]
    assert set(workflow["@type"]) == {"File", "SoftwareSourceCode", "ComputationalWorkflow"}
    assert entities[workflow["programmingLanguage"]["@id"]]["@type"] == "ComputerLanguage"
    files = {name for name, entity in entities.items() if "File" in entity["@type"]}
    assert files == names - {CRATE, SUMS} == {part["@id"] for part in root["hasPart"]}
    assert all(len(entities[name]["sha256"]) == 64 for name in files)
    for mention in [root["mentions"]]:
        action = entities[mention["@id"]]
        assert action["@type"] == "CreateAction"
        assert action["instrument"] == root["mainEntity"]
        assert action["object"]
        assert action["result"]
        assert action["startTime"] <= action["endTime"]
    yaml.safe_load(json.dumps(crate))


# --- the validator of the profile's authors ---------------------------------------------------------------------------

PUBLISHED = Path(__file__).parent / "published"
CONTEXTS = {
    "https://w3id.org/ro/crate/1.1/context": "ro-crate-1.1-context.jsonld",
    "https://w3id.org/ro/terms/workflow-run/context": "workflow-run-context.json",
}


class PublishedContexts(requests.Session):
    """Answers with the JSON-LD contexts of `published/`, so that the validator needs no network."""

    def request(self, method: str | bytes, url: str | bytes, *_: object, **__: object) -> requests.Response:  # type: ignore[override]
        response = requests.Response()
        response.url, name = str(url), CONTEXTS.get(str(url))
        response.status_code = 200 if name else 404
        response.headers["Content-Type"] = "application/ld+json"
        response._content = (PUBLISHED / name).read_bytes() if name else b""
        return response


def violations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Workflow Run Crate 0.5, and the profiles that it builds on, require and the crate does not have."""
    from rocrate_validator import models, services
    from rocrate_validator.utils.http import HttpRequester

    requester = HttpRequester(no_cache=True)
    monkeypatch.setattr(requester, "session", PublishedContexts())
    monkeypatch.setattr(HttpRequester, "_reconfigure", lambda self, **_: None)
    settings = services.ValidationSettings(
        rocrate_uri=str(folder),
        profile_identifier="workflow-run-crate-0.5",
        requirement_severity=models.Severity.REQUIRED,
    )
    return [f"{issue.check.identifier}: {issue.message}" for issue in services.validate(settings).get_issues()]


def test_the_validator_of_workflow_run_crate_finds_nothing_missing(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(project, tmp_path / "b.zip")
    unpack(tmp_path / "b.zip", tmp_path / "out")
    assert violations(tmp_path / "out", monkeypatch) == []
    path = tmp_path / "out" / CRATE
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"mainEntity"', '"mainThing"'), encoding="utf-8")
    assert any("mainEntity" in found for found in violations(tmp_path / "out", monkeypatch))
