"""The record of the images is as new as what they are built from, and the Dockerfile keeps to the locks."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from reproval.container import Image, ImageError, arguments, binds, online_command, sbom, stage
from reproval.files import write_record
from reproval.records import ImageManifest
from reproval.store import of_manifest

BASE = Path(__file__).parents[2]
sys.path[:0] = [str(BASE / "envs"), str(BASE / "containers")]

import build  # noqa: E402
import compare  # noqa: E402
import images  # noqa: E402
import install  # noqa: E402
import release  # noqa: E402
import sandbox  # noqa: E402


def test_the_record_is_as_new_as_dockerfile_and_locks() -> None:
    assert images.problems(images.read()) == []


@pytest.mark.parametrize("changed", ["Dockerfile", "lock"])
def test_a_change_that_was_not_recorded_is_found(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = images.read()
    if changed == "Dockerfile":
        copy = Path(shutil.copy(images.DOCKERFILE, tmp_path))
        monkeypatch.setattr(images, "DOCKERFILE", copy)
    else:
        shutil.copytree(images.ENVS, tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
        copy = tmp_path / "envs" / "cpu.txt"
        monkeypatch.setattr(install, "ENVS", copy.parent)
    with copy.open("a") as stream:
        stream.write("# another line\n")
    found = images.problems(record)
    assert any("cpu" in problem and "containers/build cpu --record" in problem for problem in found)
    renewed = images.renewed(images.renewed(record, "cpu"), "gpu")
    assert images.problems(renewed) == []
    assert renewed["cpu"]["built"] is None


def test_bases_are_named_by_digest_and_a_published_image_must_be() -> None:
    for engine in images.ENGINES:
        assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", images.pinned_base(engine))
    record = images.read()
    tagged = record | {"gpu": record["gpu"] | {"published": "docker://registry.example/reproval:latest"}}
    assert any("by digest" in problem for problem in images.problems(tagged))


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as containers/ and .env/images/ at once, with a build of the CPU image; nothing is pushed."""
    digest = f"sha256:{'1' * 64}"
    origin = images.inputs("cpu") | {"tool": "buildah", "date": "2026-01-02"}
    made = ImageManifest(
        image="reproval-cpu",
        digest=digest,
        sif="cpu.sif",
        sif_sha256="2" * 64,
        sif_bytes=1,
        runtime=None,
        built_from=origin,
    )
    write_record(tmp_path / "cpu.json", made)
    for name in ("cpu.sif", "cpu.oci.tar"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "listed").mkdir()
    (tmp_path / "cpu.cdx.json").write_text("{}")
    monkeypatch.setattr(build, "OUT", tmp_path)
    monkeypatch.setattr(release, "CONTAINERS", tmp_path / "listed")
    monkeypatch.setattr(release, "is_built", lambda *_: True)
    monkeypatch.setattr(release, "push", lambda *_: digest)
    monkeypatch.setattr(release, "sign", lambda *_: "none")
    monkeypatch.setattr(shutil, "which", str)
    return tmp_path / "listed"


def test_a_release_records_the_build_that_it_publishes(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["release", "cpu", "registry.example/cpu"])
    release.main()
    recorded = yaml.safe_load((released / "images.yaml").read_text())["cpu"]
    assert recorded["built"] == {
        "date": "2026-01-02",
        "base": images.pinned_base("cpu"),
        "tool": "buildah",
        "digest": recorded["published"].partition("@")[2],
        "archive": "0 MiB",
        "sif": "0 MiB",
    }


def test_an_image_on_another_base_is_not_recorded_as_published(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = f"127.0.0.1:5000/base@sha256:{'3' * 64}"
    monkeypatch.setattr(sys, "argv", ["release", "cpu", "127.0.0.1:5000/cpu", "--base", stand_in])
    with pytest.raises(images.ImagesError, match="--out"):
        release.main()
    assert list(released.iterdir()) == []


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo: apt install skopeo")
def test_what_an_older_docker_has_saved_becomes_an_oci_archive(tmp_path: Path) -> None:
    saved, layer = tmp_path / "cpu.oci.tar", packed({"etc/a": (b"a", 1)})
    diff = f"sha256:{sha256(layer).hexdigest()}"
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff]}}
    listed = [{"Config": "c.json", "RepoTags": ["localhost/reproval-cpu:latest"], "Layers": ["l/layer.tar"]}]
    files = {"manifest.json": json.dumps(listed).encode(), "c.json": json.dumps(config).encode(), "l/layer.tar": layer}
    saved.write_bytes(packed({name: (content, 0) for name, content in files.items()}))
    assert build.archive_digest(saved) is None
    assert build.saved_by_docker(saved) == f"oci-archive:{saved}"
    assert (build.archive_digest(saved) or "").startswith("sha256:")
    assert list(tmp_path.iterdir()) == [saved]


def test_labels_name_lock_base_and_the_versions_that_decide_scores() -> None:
    labels = images.labels("gpu", images.pinned_base("gpu"))
    assert labels["reproval.lock.sha256"] == images.read()["gpu"]["lock_sha256"]
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:")
    for package in ("vllm", "lm-eval", "torch", "bitsandbytes", "vllm-bnb-plugin", "nvidia-ml-py"):
        assert re.fullmatch(r"[\d.]+(\+\w+)?", labels[f"reproval.version.{package}"])


def test_only_wheels_that_a_lock_names_by_hash_are_taken_from_this_machine(tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(b"not that one")
    assert build.local_wheels("cpu", {"find-links": str(tmp_path)}) == []


def test_the_build_is_lent_pips_settings_a_line_each_without_the_machines_folders(tmp_path: Path) -> None:
    """pip lists several sources of one setting with newlines between them."""
    settings = {"extra-index-url": "file:///here/simple\nhttps://mirror/simple", "trusted-host": "a\nb", "cert": "/c"}
    lines = build.secrets(tmp_path, settings)["pip.conf"].read_text().splitlines()
    assert {"extra-index-url = https://mirror/simple", "trusted-host = a b", "find-links = /wheels"} <= set(lines)
    assert all(line == "[global]" or " = " in line for line in lines)
    assert "cert = /c" not in lines


def test_no_step_removes_what_a_shared_folder_may_hold() -> None:
    """Apptainer's own builds, and some of buildah's, lend the machine's /tmp to a step."""
    steps = sandbox.instructions(images.DOCKERFILE.read_text(encoding="utf-8"))
    assert not [rest for _, rest in steps if re.search(r"\brm\s[^&|;]*\s(/var)?/tmp\b", rest)]


def test_apptainer_alone_knows_every_step_of_the_dockerfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what needs Apptainer: the stages, the steps' words, and what an image says of itself."""
    ran: list[list[str]] = []

    def call(command: list[str], shown: bool = True) -> None:
        if "tar " in command[-1]:
            target = command[command.index("--bind") + 1].removesuffix(":/mnt")
            shutil.copytree(command[-4], target, dirs_exist_ok=True)
        elif "build" in command:
            (Path(command[-2]) / ".singularity.d/env").mkdir(parents=True)
        else:
            ran.append(command)
            if command[-1].endswith("envs/install ${ENGINE}"):
                (tmp_path / "work/packages/opt/reproval/.env/gpu").mkdir(parents=True)

    monkeypatch.setattr(sandbox, "call", call)
    monkeypatch.setattr(sandbox.Builder, "check", lambda *_: None)
    for name in ("work", "context/envs", "context/wheels"):
        (tmp_path / name).mkdir(parents=True)
    given = {"BASE_IMAGE": "a@sha256:b", "ENGINE": "gpu", "LOCK_SHA256": "0" * 64}
    secrets = {"pip.conf": tmp_path / "pip.conf"}
    (tmp_path / "pip.conf").write_text("")
    builder = sandbox.Builder(tmp_path / "work", tmp_path / "context", secrets, given)
    made = builder.build(images.DOCKERFILE.read_text(encoding="utf-8"), {"label": "value"})
    assert (made / "opt/reproval/.env/gpu").is_dir()
    assert not (tmp_path / "work/packages/etc/pip.conf").exists()
    (installing,) = [command for command in ran if command[-1].endswith("envs/install ${ENGINE}")]
    assert f"{tmp_path}/pip.conf:/etc/pip.conf:ro" in installing
    assert "ENGINE=gpu" in installing
    variables = (made / sandbox.ENVIRONMENT).read_text()
    assert "export PATH=/opt/reproval/.env/gpu/bin:" in variables
    assert "PYTHONNOUSERSITE=1" in variables
    labels = json.loads((made / ".singularity.d/labels.json").read_text())
    assert labels == {"reproval.engine": "gpu", "reproval.lock.sha256": "0" * 64, "label": "value"}
    with pytest.raises(images.ImagesError, match="does not know how to do: USER nobody"):
        builder.build("ARG BASE_IMAGE=x\nFROM ${BASE_IMAGE} AS other\nUSER nobody\n", {})


def test_jobs_with_gpus_get_the_drivers_files_and_no_job_more_folders_than_it_needs(tmp_path: Path) -> None:
    image = Image("reproval-gpu", "sha256:1", "sha256:1", tmp_path / "gpu.sif", "2" * 64, tmp_path / "gpu.json")
    work, base, store = (tmp_path / name for name in ("work", "base", "store"))
    folders = binds(work, base, store, [work / "tasks", tmp_path / "model"])
    modes = {path: mode for path, mode in folders if path.is_relative_to(tmp_path)}
    assert modes == {
        work: "rw",
        base: "ro",
        tmp_path / "model": "ro",
        store: "ro",
        store / "cache": "rw",
        store / "huggingface": "rw",
        store / "huggingface/hub": "ro",
    }
    with_gpus, without = (arguments(image, gpus, folders).split() for gpus in (2, 0))
    assert "--nv" in with_gpus
    assert "--nv" not in without
    for words in (with_gpus, without):
        assert {"--contain", "--cleanenv", "--net"} <= set(words)
        assert words[words.index("--network") + 1] == "none"
        # Else a model on several nodes would be looked for on one.
        assert '"RAY_ADDRESS=$RAY_ADDRESS"}' in words


def test_a_folder_behind_several_links_is_bound_at_each_of_them(tmp_path: Path) -> None:
    for name in ("work", "lustre/data/models/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data").symlink_to("lustre/data")
    (tmp_path / "work/models").symlink_to(tmp_path / "data/models")
    bound = dict(binds(tmp_path / "work", tmp_path / "base", tmp_path / "store", [tmp_path / "work/models/mine"]))
    assert bound[tmp_path / "data/models/mine"] == bound[tmp_path / "lustre/data/models/mine"] == "ro"
    (tmp_path / "work/turning").symlink_to("turning")
    binds(tmp_path / "work", tmp_path / "base", tmp_path / "store", [tmp_path / "work/turning"])


def test_what_the_links_in_a_folder_of_the_configuration_lead_to_is_bound(tmp_path: Path) -> None:
    """As in a snapshot of the Hub's cache, whose files are all links."""
    hub = tmp_path / "disk/models--x"
    for folder in ("work/tasks", "disk/models--x/blobs", "disk/models--x/snapshots/c0ffee", "shared/tasks"):
        (tmp_path / folder).mkdir(parents=True)
    (hub / "blobs/1a").write_text("{}")
    (hub / "snapshots/c0ffee/config.json").symlink_to("../../blobs/1a")
    (tmp_path / "cache").symlink_to("disk")
    (tmp_path / "work/tasks/more").symlink_to(tmp_path / "shared/tasks")
    asked = [tmp_path / "cache/models--x/snapshots/c0ffee", tmp_path / "work/tasks"]
    bound = dict(binds(tmp_path / "work", tmp_path / "base", tmp_path / "store", asked))
    for needed in (asked[0], hub / "snapshots/c0ffee", hub / "blobs", tmp_path / "shared/tasks"):
        assert bound[needed] == "ro"


def test_parts_of_the_store_may_lie_on_another_disk(tmp_path: Path) -> None:
    store = tmp_path / "work/store"
    store.mkdir(parents=True)
    for name in ("models", "huggingface"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (store / name).symlink_to(tmp_path / "disk" / name)
    folders = binds(tmp_path / "work", tmp_path / "base", store, [])
    bound = dict(folders)
    assert bound[tmp_path / "disk/models"] == bound[tmp_path / "disk/huggingface/hub"] == "ro"
    assert bound[tmp_path / "disk/huggingface"] == "rw"
    # What lies in another folder is bound after it, else that would lie upon it.
    order = [path for path, _ in folders]
    assert all(order.index(path) > order.index(above) for path in order for above in path.parents if above in bound)


def test_a_path_that_leaves_the_working_directory_by_dots_is_bound(tmp_path: Path) -> None:
    for name in ("work", "models/m", "far/away", "far/m"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work/link").symlink_to(tmp_path / "far/away")
    asked = [tmp_path / "work/../models/m", tmp_path / "work/link/../m"]
    bound = dict(binds(tmp_path / "work", tmp_path / "base", tmp_path / "store", asked))
    assert bound[tmp_path / "models/m"] == bound[tmp_path / "far/m"] == "ro"


def words(text: str, **variables: str) -> list[str]:
    """What bash makes of arguments."""
    bash = ["/bin/bash", "-euo", "pipefail", "-c", f"printf '%s\\n' {text}"]
    done = subprocess.run(bash, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"} | variables)
    return done.stdout.splitlines()


def test_the_folder_for_copies_is_bound_where_it_exists(tmp_path: Path) -> None:
    sif, scratch = tmp_path / "gpu.sif", tmp_path / "scratch of mine"
    image = Image("reproval-gpu", "sha256:1", "sha256:1", sif, "2" * 64, tmp_path / "gpu.json")
    sif.write_bytes(b"")
    asked = arguments(image, 0, [], str(scratch))
    assert str(scratch) not in words(asked)
    scratch.mkdir()
    found = words(asked)
    assert found[found.index(str(scratch)) - 1] == "--bind"


@pytest.mark.parametrize("there", [True, False])
def test_stage_takes_the_callers_certificates_along_if_they_are_there(there: bool, tmp_path: Path) -> None:
    sif, mine, program = tmp_path / "gpu.sif", tmp_path / "my certificates.pem", tmp_path / "apptainer"
    image = Image("reproval-gpu", "sha256:1", "sha256:1", sif, "2" * 64, tmp_path / "gpu.json")
    sif.write_bytes(b"")
    if there:
        mine.write_text("")
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "${SSL_CERT_FILE-none}"\n')
    program.chmod(0o755)
    # As the rules call it: a function, with bash's strict settings.
    command = (
        f'set -euo pipefail; online_engine() {{ {online_command(image, [], "")} "$@"; }}; online_engine -m x | cat'
    )
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SSL_CERT_FILE": str(mine)}
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, check=True, env=variables)
    *given, seen = done.stdout.splitlines()
    assert given[-3:] == ["python3", "-m", "x"]
    assert seen == (str(mine) if there else "none")
    assert (f"{mine}:{mine}:ro" in given) == there


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an `apptainer` first on PATH that pulls what the file `image` there holds; without it, fails."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/apptainer"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] || cp {tmp_path}/image "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "image").write_text("an image")
    return tmp_path


def test_an_image_that_was_pulled_is_kept_without_a_registry_and_a_damaged_one_is_not(registry: Path) -> None:
    digest = f"sha256:{'1' * 64}"
    record = registry / "store/images/1.json"

    def staged(record: Path) -> ImageManifest:
        made = stage(f"docker://r/n@{digest}", record.with_suffix(".sif"), None, digest, record)
        write_record(record, made)
        return made

    first = staged(record)
    assert first.sif_sha256 == sha256(b"an image").hexdigest()
    (registry / "image").rename(registry / "unreachable")
    moved = (registry / "store").rename(registry / "moved") / "images/1.json"
    assert staged(moved) == first
    assert of_manifest(moved, registry / "moved") == []
    moved.with_suffix(".sif").write_text("another")
    with pytest.raises(ImageError, match="could not pull"):
        staged(moved)
    assert sorted(path.name for path in moved.parent.iterdir()) == ["1.json", "1.sif"]
    (registry / "unreachable").rename(registry / "image")
    assert staged(moved) == first


def test_an_sbom_of_another_image_is_none(tmp_path: Path) -> None:
    sif, published = tmp_path / "cpu.sif", tmp_path / "containers"
    image = Image("reproval-cpu", "sha256:1", "sha256:1", sif, "2" * 64, tmp_path / "cpu.json")

    def write(path: Path, version: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"metadata": {"component": {"version": version}}}))

    assert sbom(image, published) is None
    write(tmp_path / "cpu.cdx.json", "sha256:3")
    assert sbom(image, published) is None
    write(published / "gpu.cdx.json", "sha256:1")
    assert sbom(image, published) == published / "gpu.cdx.json"
    write(tmp_path / "cpu.cdx.json", "2" * 64)
    assert sbom(image, published) == tmp_path / "cpu.cdx.json"


def packed(members: dict[str, tuple[bytes, int]]) -> bytes:
    """A tar of files given as name -> (content, time)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for name, (content, time) in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), time
            made.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def archive(path: Path, files: dict[str, tuple[bytes, int]]) -> Path:
    """An OCI archive of one layer, of files given as name -> (content, time)."""

    def digest(content: bytes) -> str:
        return f"sha256:{sha256(content).hexdigest()}"

    layer = packed(files)
    config = json.dumps({"history": [{"created_by": "RUN x"}], "rootfs": {"diff_ids": [digest(layer)]}}).encode()
    manifest = json.dumps({"config": {"digest": digest(config)}, "layers": [{"digest": digest(layer)}]}).encode()
    index = json.dumps({"manifests": [{"digest": digest(manifest)}]}).encode()
    blobs = {f"blobs/{digest(blob).replace(':', '/')}": (blob, 0) for blob in (layer, config, manifest)}
    path.write_bytes(packed(blobs | {"index.json": (index, 0)}))
    return path


def test_two_builds_are_compared_file_by_file(tmp_path: Path) -> None:
    files = {"etc/a": (b"a", 1), "etc/b": (b"b", 1), "etc/c": (b"c", 1)}
    old = archive(tmp_path / "old.tar", files)
    assert list(compare.differences(old, archive(tmp_path / "same.tar", files))) == []
    new = archive(tmp_path / "new.tar", {"etc/a": (b"A", 1), "etc/b": (b"b", 2), "etc/d": (b"d", 1)})
    assert list(compare.differences(old, new)) == [
        "layer 1 (RUN x): 4 of 4 files differ",
        "  etc/a: content",
        "  etc/b: mtime 1 and 2",
        "  etc/c: only in the first",
        "  etc/d: only in the second",
    ]
