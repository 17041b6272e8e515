"""Builds the Dockerfile with Apptainer alone: its stages are folders, and every RUN an `apptainer exec` in one.

Not a `%post`, which would lend the machine's own /tmp to the steps. Here nothing of the machine is lent but its
resolv.conf and what `--mount` of a step names, and a probe makes sure of that before the first step runs.

Knows the instructions that containers/Dockerfile uses, and refuses any other.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from images import ImagesError

EXEC = ["apptainer", "--quiet", "exec", "--writable", "--containall", "--cleanenv", "--no-home", "--pwd", "/"]
EXEC += ["--no-mount", "tmp,home,cwd,hostfs,bind-paths"]
# Apptainer sources these in the order of their names; the base's own come before.
ENVIRONMENT = ".singularity.d/env/20-dockerfile.sh"
PROBE = """
for name in "$@"; do if [ -e "$name" ]; then echo "$name of the machine is there"; exit 1; fi; done
if cut -d ' ' -f 5 /proc/self/mountinfo | grep -Ex '/(tmp|var|var/.*|home|root|usr|opt)'; then exit 1; fi
"""


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of every step, continued lines joined by a newline where a comment stood between."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    steps = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (step.partition(" ") for step in steps)]


@dataclass
class Stage:
    folder: Path
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def expand(self, text: str) -> str:
        return expanded(text, self.environment | self.arguments)

    def inside(self, path: str) -> Path:
        return self.folder / path.lstrip("/")


def unprivileged() -> list[str]:
    """What Apptainer needs to be told by who is not root, to be root in the image."""
    return [] if os.geteuid() == 0 else ["--fakeroot"]


def expanded(text: str, values: Mapping[str, str]) -> str:
    """`text` with ${NAME} replaced. Raises ImagesError for a name that has no value."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ImagesError(f"containers/Dockerfile: ${{{found[1]}}} has no value in: {text}")
        return values[found[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def pairs(text: str) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in shlex.split(text))


class Builder:
    """Runs the Dockerfile's steps below `work`; `mounted` are secrets by id, `given` the build arguments."""

    def __init__(self, work: Path, context: Path, mounted: Mapping[str, Path], given: Mapping[str, str]) -> None:
        self.work, self.context, self.mounted, self.given = work, context, mounted, given
        self.defaults: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        self.all: list[Stage] = []
        self.exec = [*EXEC, *unprivileged()]

    def build(self, dockerfile: str, labels: Mapping[str, str], insecure: bool = False) -> Path:
        """Run all steps and return the folder of the last stage. Raises ImagesError."""
        stage: Stage | None = None
        for number, (word, rest) in enumerate(instructions(dockerfile), 1):
            print(f"STEP {number}: {word} {rest}", flush=True)
            if word == "FROM":
                stage = self.begin(rest, insecure)
            elif word == "ARG" and stage is None:
                name, _, default = rest.partition("=")
                self.defaults[name] = self.given.get(name, default)
            elif stage is None:
                raise ImagesError(f"containers/Dockerfile: {word} before FROM")
            elif word == "ARG":
                name, _, default = rest.partition("=")
                stage.arguments[name] = self.given.get(name, default)
            elif word == "RUN":
                self.run(stage, rest)
            elif word == "COPY":
                self.copy(stage, rest)
            elif word == "ENV":
                stage.environment |= pairs(stage.expand(rest))
            elif word == "LABEL":
                stage.labels |= pairs(stage.expand(rest))
            elif word == "ENTRYPOINT" and rest == "[]":
                pass
            elif word == "CMD":
                self.command(stage, json.loads(rest))
            else:
                raise ImagesError(f"containers/Dockerfile: Apptainer alone does not know how to do: {word} {rest}")
        if stage is None:
            raise ImagesError("containers/Dockerfile: no FROM")
        stage.labels |= labels
        finish(stage)
        return stage.folder

    def begin(self, rest: str, insecure: bool) -> Stage:
        base, _, name = expanded(rest, self.defaults).partition(" AS ")
        folder = self.work / (name or "last")
        if base in self.stages:
            before = self.stages[base]
            folder.mkdir()
            # From inside, where files of other users than root have owners that this user may give and read.
            copy = "tar --create --directory=/ --one-file-system --exclude=./mnt . | tar --extract --directory=/mnt -p"
            self.inside(before, copy, bind=(folder, "/mnt"))
            (folder / "mnt").mkdir(exist_ok=True)
            stage = Stage(folder, {}, dict(before.environment), dict(before.labels))
        else:
            flags = ["--no-https"] if insecure else []
            build = ["apptainer", "--quiet", "build", "--disable-cache", "--sandbox", *flags]
            call([*build, *unprivileged(), str(folder), f"docker://{base}"])
            stage = Stage(folder)
        self.all.append(stage)
        if name:
            self.stages[name] = stage
        self.check(stage)
        return stage

    def inside(self, stage: Stage, command: str, bind: tuple[Path, str] | None = None) -> None:
        flags = ["--bind", f"{bind[0]}:{bind[1]}"] if bind else []
        call([*self.exec, *flags, str(stage.folder), "/bin/sh", "-c", command], shown=False)

    def close(self) -> None:
        """Leave nothing that only a user of the image may remove."""
        if os.geteuid() != 0:
            for stage in self.all:
                # Where /proc and /sys are mounted nothing can be changed, nor need it be.
                self.inside(stage, "find / -xdev ! -uid 0 -exec chown --no-dereference 0:0 {} + 2>/dev/null; true")

    def check(self, stage: Stage) -> None:
        """Raise ImagesError unless a step sees nothing of the machine's /tmp, home and this build's own folder."""
        canary = Path(f"/tmp/.reproval-{secrets.token_hex(8)}")
        canary.touch(exist_ok=False)
        try:
            hidden = [str(canary), str(self.work.resolve()), str(self.context.resolve())]
            done = subprocess.run([*self.exec, str(stage.folder), "/bin/sh", "-c", PROBE, "probe", *hidden])
        finally:
            canary.unlink()
        if done.returncode != 0:
            raise ImagesError(
                "Apptainer lends folders of this machine to the steps of a build, or cannot run one in a folder that is"
                " written; build with buildah, podman or docker, or on another machine"
            )

    def run(self, stage: Stage, rest: str) -> None:
        flags, made = [], []
        while found := re.match(r"--mount=(\S+)\s+", rest):
            rest = rest[found.end() :]
            mount = pairs(found[1].replace(",", " "))
            if mount["type"] == "secret":
                source = self.mounted.get(mount["id"])
            elif mount["type"] == "bind":
                source = self.context / mount["source"]
            else:
                raise ImagesError(f"containers/Dockerfile: Apptainer alone does not know --mount=type={mount['type']}")
            if source is None:
                continue
            target = stage.inside(mount["target"])
            # In a folder that is written, Apptainer does not make the places where it binds.
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.mkdir() if source.is_dir() else target.touch()
                made.append(target)
            flags += ["--bind", f"{source}:{mount['target']}:ro"]
        values = [f"{name}={value}" for name, value in (stage.environment | stage.arguments).items()]
        try:
            call([*self.exec, *flags, str(stage.folder), "/usr/bin/env", *values, "/bin/sh", "-c", rest], shown=False)
        finally:
            for target in made:
                target.rmdir() if target.is_dir() else target.unlink()

    def copy(self, stage: Stage, rest: str) -> None:
        words = shlex.split(stage.expand(rest))
        root = self.context
        if found := re.fullmatch(r"--from=(\S+)", words[0]):
            root = self.stages[found[1]].folder
            words = words[1:]
        source, target = root / words[0].lstrip("/"), stage.inside(words[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Across stages a copy would be one too many: the one that it comes from is not used again.
        if root == self.context:
            shutil.copytree(source, target, symlinks=True)
        else:
            source.rename(target)

    def command(self, stage: Stage, words: list[str]) -> None:
        script = stage.inside(".singularity.d/runscript")
        script.write_text(f'#!/bin/sh\n[ $# -gt 0 ] || set -- {shlex.join(words)}\nexec "$@"\n', encoding="utf-8")
        script.chmod(0o755)


def finish(stage: Stage) -> None:
    """Write down for Apptainer what an image's configuration would say: variables and labels."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in stage.environment.items()]
    script = stage.inside(ENVIRONMENT)
    script.write_text("#!/bin/sh\n" + "".join(lines), encoding="utf-8")
    script.chmod(0o755)
    labels = stage.inside(".singularity.d/labels.json")
    known = json.loads(labels.read_text(encoding="utf-8")) if labels.exists() else {}
    labels.write_text(json.dumps(known | stage.labels, indent=1) + "\n", encoding="utf-8")


def call(command: list[str], shown: bool = True) -> None:
    if shown:
        print("+ " + shlex.join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise ImagesError(f"failed: {shlex.join(command)}")
