# The configuration, checked, and what the rules of every stage share.

import os
import shlex
import sys

from snakemake.deployment.singularity import Singularity
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

BASE = Path(workflow.basedir)
if set("{}") & set(str(BASE)):
    raise WorkflowError(
        f"{BASE}: Snakemake takes braces in a path for wildcards; move the workflow to a folder without"
    )
sys.path[:0] = [str(BASE / folder) for folder in ("workflow", "envs")]

from install import stamp_of, up_to_date
from reproval import bundle_archive as bundles
from reproval import config as configuration
from reproval import container as containers
from reproval import folders, provenance, reference, run_file
from reproval import resources as demand
from reproval.files import sha256_json

# What a site's profile sets for `evaluate` (partition, GPU, account) holds for the job that looks at its machines, whose
# time and memory are its own. Snakemake reads this mapping once, at the first rule.
SET_RESOURCES = dict(workflow.resource_settings.overwrite_resources)
if "evaluate" in SET_RESOURCES:
    SET_RESOURCES["doctor_node"] = type(SET_RESOURCES["evaluate"])(
        {name: value for name, value in SET_RESOURCES["evaluate"].items() if name not in ("mem_mb", "runtime")}
        | dict(SET_RESOURCES.get("doctor_node", {}).items())
    )
    workflow.resource_settings.overwrite_resources = SET_RESOURCES


def asked_of_slurm(wildcards):
    """GPU type and partition of the node's job, as the profile has them."""
    set_here = SET_RESOURCES.get("doctor_node") or {}
    by_default = workflow.resource_settings.default_resources or {}
    words = []
    for option, name in (("--gpu-model", "gpu_model"), ("--partition", "slurm_partition")):
        found = set_here.get(name) or by_default.get(name)
        # Text of a profile has no value outside of a job, and may be quoted twice.
        if text := str(getattr(found, "raw", found) or "").strip("'\""):
            words += [option, text]
    return shlex.join(words)


try:
    CONFIGFILES = workflow.config_settings.configfiles or workflow.configfiles
    ASKED = reference.configure(config, BASE, Path.cwd())
    CONFIG = configuration.load(ASKED, [Path(name) for name in CONFIGFILES], BASE, Path.cwd())
except configuration.ConfigError as error:
    raise WorkflowError(str(error))

# --- where the engine runs -------------------------------------------------------------------------------------------

CONTAINERIZED = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
ENGINE_ENV = "gpu" if CONFIG.hardware.gpus else "cpu"
STORE = CONFIG.store
IMAGE = None
CONTAINER = None
SBOM = None
if CONTAINERIZED:
    try:
        IMAGE = containers.chosen(
            CONFIG.container,
            BASE / f".env/images/{ENGINE_ENV}.json",
            stamp_of(ENGINE_ENV)["sha256"],
            Path(STORE),
            Path.cwd(),
        )
    except containers.ImageError as error:
        raise WorkflowError(str(error))
    CONTAINER = str(IMAGE.sif)
    SBOM = containers.sbom(IMAGE, BASE / "containers")
    if containers.runtime() is None:
        # Snakemake wants Apptainer where it is started; it is needed only where jobs run, which may be other machines.
        Singularity().binary, Singularity().checked = "apptainer", True
ENVIRONMENT = IMAGE.identity if IMAGE else "{lock} sha256:{sha256}".format(**stamp_of(ENGINE_ENV))
CONTROLLER = shlex.quote(sys.executable)

# --- what is evaluated -----------------------------------------------------------------------------------------------

try:
    RUNS = {run.name: run for run in configuration.runs(CONFIG, BASE, Path.cwd(), ENVIRONMENT)}
except configuration.ConfigError as error:
    raise WorkflowError(str(error))
RUN_FILES = {name: run_file.run_file(run, CONFIG, ENVIRONMENT) for name, run in RUNS.items()}
try:
    SNAPSHOT = run_file.write_snapshot(Path(".snakemake/reproval"), list(RUN_FILES.values()))
except OSError as error:
    raise WorkflowError(
        f"{Path.cwd()}: cannot be written ({error.strerror}); name another working directory with --directory"
    )
TIERS = str(folders.resolve(CONFIG.tiers, Path.cwd(), BASE))


# On one machine a GPU serves one job at a time unless --resources gpu=N says that there are more. The scope is local:
# a scheduler's queue is not held back by it, and a job on a node has all that the scheduler gave it.
if not workflow.remote_exec:
    if "gpu" not in workflow.global_resources:
        workflow.global_resources["gpu"] = max(CONFIG.hardware.gpus, 1)
    if CONFIG.hardware.jobs_per_gpu > 1:
        # Shares of GPUs are counted instead.
        SHARES = workflow.global_resources["gpu"].value * CONFIG.hardware.jobs_per_gpu
        workflow.global_resources["gpu"] = workflow.global_resources["gpu_share"] = SHARES


resource_scopes:
    gpu="local",
    gpu_share="local",


# Models and suites are staged by what they are, so that a change of anything
# else of a run, or another model beside it, asks for no network.
SUITE_KEYS = {name: run_file.suite_keys(run) for name, run in RUNS.items()}
MODEL_KEYS = {name: run_file.model_key(run) for name, run in RUNS.items()}
MODEL_PATHS = {MODEL_KEYS[name]: run.model.path for name, run in RUNS.items()}
MODELS = sorted(set(MODEL_KEYS.values()))
SUITES = sorted({key for keys in SUITE_KEYS.values() for key in keys})


def any_of(names):
    return "|".join(map(re.escape, names))


wildcard_constraints:
    run=any_of(RUNS),
    model=any_of(MODELS),
    suite=any_of(SUITES),


def manifests(wildcards):
    """What has to be in the store before a run's model can be looked at."""
    return IMAGE_RECORD | {
        "model": f"{STORE}/manifests/models/{MODEL_KEYS[wildcards.run]}.json",
        "tasks": [f"{STORE}/manifests/suites/{key}.json" for key in SUITE_KEYS[wildcards.run]],
    }


def weights_note(wildcards):
    """The note that a Hub's model is there with its weights; a local folder has them."""
    return WEIGHTS.get(MODEL_KEYS[wildcards.run], [])


def sampled_weights(wildcards):
    """Files of a local model that its name knows by samples alone: of a change between these, their times tell."""
    local = MODEL_PATHS[wildcards.model]
    return [str(path) for path in folders.sampled(Path(local))] if local else []


# --- what an evaluation asks for ---------------------------------------------------------------------------------------


# As functions of the plan: until that is there, Snakemake shows <TBD>, and it asks again just before the job runs.
def history_of(wildcards):
    shard = [f"{wildcards.shard}-of-{wildcards.shards}"] if "shard" in wildcards.keys() else []
    return demand.read_history(Path("results/work", wildcards.run, *shard))


def planned_gpus(wildcards, input):
    return demand.gpus(demand.read_plan(input.plan), history_of(wildcards))


def planned_cpus(wildcards, input):
    try:
        return demand.cpus(demand.read_plan(input.plan), history_of(wildcards))
    except FileNotFoundError:
        # Threads cannot be shown as <TBD>. They are asked for again before the job runs.
        return CONFIG.hardware.cpus


def planned_gpu_shares(wildcards, input):
    plan = demand.read_plan(input.plan)
    return planned_gpus(wildcards, input) * CONFIG.hardware.jobs_per_gpu // plan.jobs_per_gpu


SHARED_GPU = {"gpu_share": planned_gpu_shares} if CONFIG.hardware.jobs_per_gpu > 1 else {}


def planned_mem_mb(wildcards, input, attempt):
    return demand.mem_mib(demand.read_plan(input.plan), attempt)


def planned_runtime(wildcards, input, attempt):
    return demand.runtime_min(demand.read_plan(input.plan), attempt, int(wildcards.get("shards", 1)))


MANIFESTS = [
    *expand(f"{STORE}/manifests/models/{{model}}.json", model=MODELS),
    *expand(f"{STORE}/manifests/suites/{{suite}}.json", suite=SUITES),
]

WEIGHTS = {key: f"{STORE}/manifests/models/{key}.weights" for key in MODELS if not MODEL_PATHS[key]}

# Input of all that is made of evaluations, though nothing reads it there: of a job that failed Snakemake has removed the
# old outputs, and would find what they led to up to date. The plan, which is newer, tells that it is not.
PLANS = expand("results/runs/{run}/plan.json", run=RUNS)

# What targets over all runs read, as files that their commands name.
LISTS = {
    name: run_file.write_list(Path(".snakemake/reproval"), files)
    for name, files in {
        "evaluations": expand("results/runs/{run}/evaluation.json", run=RUNS),
        "plans": PLANS,
        "manifests": MANIFESTS,
    }.items()
}

# --- the environment of every job -------------------------------------------------------------------------------------

# Caches follow HOME unless told, and HOME is the working directory in a container: keep them all in the store. No user
# site-packages, no code from the caller's PYTHONPATH or from the working directory.
CACHE = Path(STORE).resolve() / "cache"
HUGGINGFACE = Path(STORE).resolve() / "huggingface"
JOB_ENVIRONMENT = {
    "PYTHONPATH": BASE / "workflow",
    "PYTHONNOUSERSITE": 1,
    "PYTHONSAFEPATH": 1,
    "REPROVAL_GIT": provenance.git_note(),
    "REPROVAL_SNAPSHOT": SNAPSHOT,
    **{f"REPROVAL_{name.upper()}": path for name, path in LISTS.items()},
    "HF_HOME": HUGGINGFACE,
    # What the caller has set of these would win over HF_HOME.
    "HF_HUB_CACHE": HUGGINGFACE / "hub",
    "HF_DATASETS_CACHE": HUGGINGFACE / "datasets",
    "HF_MODULES_CACHE": HUGGINGFACE / "modules",
    "HF_XET_CACHE": HUGGINGFACE / "xet",
    "NLTK_DATA": Path(STORE).resolve() / "nltk",
    "XDG_CACHE_HOME": CACHE,
    "VLLM_CACHE_ROOT": CACHE / "vllm",
    "TRITON_CACHE_DIR": CACHE / "triton",
    "TORCHINDUCTOR_CACHE_DIR": CACHE / "inductor",
    "VLLM_NO_USAGE_STATS": 1,
    "DO_NOT_TRACK": 1,
}
# --- what runs the engine's Python -------------------------------------------------------------------------------------

# After `stage` nothing looks for the network, and no token reaches a job.
WITHOUT_NETWORK = (
    "env -u HF_TOKEN -u HUGGING_FACE_HUB_TOKEN"
    " HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TRANSFORMERS_OFFLINE=1 "
)

if IMAGE:
    IMAGE_RECORD = {"image": str(IMAGE.record)}
    bound = containers.binds(
        Path.cwd(),
        BASE,
        Path(STORE),
        [
            *(folders.resolve(run.model.path, Path.cwd()) for run in RUNS.values() if run.model.path),
            *(
                folders.resolve(unit.include_path, Path.cwd(), BASE)
                for run in RUNS.values()
                for unit in run.units
                if unit.include_path
            ),
        ],
    )
    # Apptainer does not make what it is to bind.
    for name in containers.STORE_BINDS:
        Path(STORE, name).mkdir(parents=True, exist_ok=True)
    given = workflow.deployment_settings.apptainer_args
    made = containers.arguments(IMAGE, CONFIG.hardware.gpus, bound, CONFIG.local_copy)
    # A job on another node is a Snakemake of its own, which has been given them already.
    if not given.startswith(made):
        workflow.deployment_settings.apptainer_args = f"{made} {given}".strip()
    inside = f" -m reproval.container run {shlex.quote(str(IMAGE.record))}"
    ENGINE = f"python3{inside}"
    ONLINE_ENGINE = f"{containers.online_command(IMAGE, bound, given.removeprefix(made))}{inside}"
    exported = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in JOB_ENVIRONMENT.items())
    started = f'{containers.runtime() or "apptainer"} exec --home "$PWD" {workflow.deployment_settings.apptainer_args}'
    INSIDE = f"{started} {shlex.quote(str(IMAGE.sif))} env {exported} {WITHOUT_NETWORK}python3"
else:
    IMAGE_RECORD = {}
    ENGINE = ONLINE_ENGINE = shlex.join([str(BASE / "envs" / "python"), ENGINE_ENV])
    INSIDE = WITHOUT_NETWORK + ENGINE


HOW_A_JOB_IS_RUN = [
    *(["--silence-limit-h", str(CONFIG.silence_limit_h)] if CONFIG.silence_limit_h else []),
    *(["--local-copy", CONFIG.local_copy] if CONFIG.local_copy else []),
]
# What the rules' commands begin with. As functions of the shell they are no part of a command, so that a checkout or an
# environment that moved, or another way to run a job, is no reason to run it again.
COMMANDS = {
    "controller": CONTROLLER,
    "engine": WITHOUT_NETWORK + ENGINE,
    "online_engine": ONLINE_ENGINE,
    "inside": INSIDE,
    "evaluate": shlex.join(["engine", "-m", "reproval.evaluate", *HOW_A_JOB_IS_RUN]),
}
# In a file, since Snakemake prints the whole command of a job that failed, above the reason.
SETUP = run_file.write_list(
    Path(".snakemake/reproval"),
    [
        *(f"export {name}={shlex.quote(str(value))}" for name, value in JOB_ENVIRONMENT.items()),
        *(f'{name}() {{ {command} "$@"; }}' for name, command in COMMANDS.items()),
    ],
    kind="sh",
)
# Replaces Snakemake's own prefix: else the exit code of `... | tee LOG` is tee's.
shell.prefix(f"set -euo pipefail; . {SETUP}; ")

# --- what a reproduction is judged by ----------------------------------------------------------------------------------

if CONFIG.reference:
    AGAINST = {"reference": str(reference.find(CONFIG.reference, "reference", BASE, Path.cwd()))}
elif CONFIG.bundle:
    AGAINST = {"bundle": str(bundles.unpacked(reference.find(CONFIG.bundle, "bundle", BASE, Path.cwd()), Path(STORE)))}
else:
    AGAINST = {}


def judged_against(wildcards):
    """The file that decides what a run is judged by."""
    if not AGAINST:
        raise WorkflowError(
            "`reproduce` needs --config reference=FILE, a published evaluation such as those in config/references/, "
            "or --config bundle=FILE, which `snakemake bundle` makes on another machine"
        )
    ((kind, path),) = AGAINST.items()
    return path if kind == "reference" else f"{path}/{bundles.SUMS}"


# --- what an export is -------------------------------------------------------------------------------------------------

EXPORTS = {name: f"results/exports/{name}" for name in CONFIG.export.formats} | (
    {"ro-crate": "results/bundle.zip"} if "ro-crate" in CONFIG.export.formats else {}
)


def tracker_packages(wildcards):
    """No file, but a word before any job starts if the library of a tracker is missing."""
    if wildcards.format not in ("mlflow", "wandb"):
        return []
    if not up_to_date("export"):
        raise WorkflowError(
            f"export.formats: {wildcards.format} needs a library that is not installed, or not as envs/export.txt has "
            f"it\n  mend: {BASE}/envs/install export"
        )
    return []
