"""The records that the stages hand to each other.

Every arrow between two stages is a file that holds one of these models. Units are in the names (`_bytes`, `_s`,
`_tokens`); `_gib` stands only where people read. Unknown keys are refused, so a record that an older or newer
reproval wrote is refused by its `version` instead of being misread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dtype = Literal["float32", "float16", "bfloat16"]

# A neutral lever changes rounding at most; a score lever changes what is computed, and marks every number it touched.
NeutralLever = Literal[
    "max_num_batched_tokens",
    "max_num_seqs",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "tensor_parallel_size",
    "submit_batch",
]
ScoreLever = Literal["max_model_len", "quantization", "kv_cache_dtype", "dtype"]
Lever = NeutralLever | ScoreLever


class Part(BaseModel):
    """A piece of a record. A model that overflows scores NaN or Infinity: text in JSON, which has no such numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="strings")


class Record(Part):
    """A whole file. `version` is raised when a field changes its meaning or goes."""

    version: Literal[1] = 1


# --- stage ---------------------------------------------------------------------------------------------------------


class StoredFile(Part):
    path: str = Field(description="Relative to the folder that the manifest names, with forward slashes.")
    size_bytes: int
    sha256: Sha256


class ModelManifest(Record):
    """What `stage` put into the store, or found in a local folder, for one model."""

    kind: Literal["model-manifest"] = "model-manifest"
    model: str
    source: Literal["hub", "local"]
    hub_id: str | None = None
    revision: str | None = Field(default=None, description="The resolved 40-hex commit; None for a local folder.")
    folder: str = Field(description="Where the files are, relative to the working directory if they lie below it.")
    files: list[StoredFile]
    digest: Sha256 = Field(description="SHA-256 over the sorted (path, sha256) pairs: the identity of the model.")


class ImageManifest(Record):
    """The image that the engine runs in, as a file on this machine."""

    kind: Literal["image-manifest"] = "image-manifest"
    image: str = Field(description="As the configuration names it, or the name that containers/build gave it.")
    digest: str | None = Field(description="sha256:... of the OCI image; None for a .sif file of unknown origin.")
    sif: str = Field(
        description="Path; relative to the record's folder unless it is a .sif file that the configuration names."
    )
    sif_sha256: Sha256
    sif_bytes: int
    runtime: str | None = Field(description="Version of the program that pulled, built or hashed it.")
    built_from: dict[str, str] | None = Field(
        default=None, description="Of an image that was built here: base, lock and Dockerfile with their hashes, tool."
    )


class DatasetSource(Part):
    task: str
    path: str | None
    name: str | None = None
    revision: str | None = None


class TaskManifest(Record):
    """What `stage` fetched for the tasks of one suite."""

    kind: Literal["task-manifest"] = "task-manifest"
    suite: str
    datasets: list[DatasetSource]
    task_files: list[StoredFile]
    files: list[StoredFile] = Field(
        default=[], description="Of the data sets' cache, relative to the store. Not in the digest: they hold times."
    )
    digest: Sha256


# --- facts ---------------------------------------------------------------------------------------------------------


class TensorTotal(Part):
    """All tensors of one storage dtype (safetensors names: BF16, F32, I32, F8_E4M3, ...)."""

    dtype: str
    tensors: int
    elements: int
    size_bytes: int


class CacheGroup(Part):
    """Layers that share one way of keeping state.

    `full` and `mla` grow with the sequence; `sliding` grows up to `window_tokens`; `state` (Mamba, linear attention)
    holds `state_bytes` for each sequence however long it is.
    """

    kind: Literal["full", "mla", "sliding", "state"]
    layers: int
    elements_per_token: int = Field(default=0, description="For all these layers together, before tensor parallelism.")
    window_tokens: int | None = None
    state_bytes: int = Field(default=0, description="For each sequence, for all these layers together.")


class ModelFacts(Part):
    """Read from config.json and the safetensors headers; no weights are loaded."""

    architecture: str
    model_type: str
    parameters: int = Field(description="Logical parameters: tied tensors once, packed 4-bit tensors unpacked.")
    tower_parameters: int = Field(
        default=0,
        description="Those of towers for images and sound, which are not loaded; none of the below counts them.",
    )
    checkpoint_bytes: int = Field(description="Bytes of all tensors as they are stored, tied tensors once.")
    tensors: list[TensorTotal]
    linear_parameters: int = Field(
        description="Those that weight quantization touches: all but embeddings, lm_head, norms."
    )
    checkpoint_dtype: Dtype | None = Field(description="config.json's dtype, else what most parameters are stored in.")
    quantization: str | None = Field(default=None, description="The checkpoint's own method (awq, gptq, fp8, ...).")
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: int = Field(default=0, description="Those of routed experts, all of them; in memory at once.")
    soft_caps_logits: bool = False
    nested_absmax_elements: int = Field(
        default=0, description="bitsandbytes' double quantization: scales stored in a byte and loaded as float32."
    )
    cache: list[CacheGroup]


RequestType = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]


class TaskFacts(Part):
    """The tokenized requests of one leaf task, as lm-eval will make them."""

    suite: str
    unit: str = Field(description="The suite's entry (task, group or tag) that this leaf task belongs to.")
    task: str
    request_type: RequestType
    documents: int
    requests: int
    context_tokens: int
    continuation_tokens: int
    generation_tokens: int = Field(description="The most that all requests together may generate.")
    longest_request_tokens: int = Field(
        description="Context and continuation, or context and max_gen_toks, of one request."
    )
    lengths: dict[int, int] = Field(description="Request length in tokens -> number of requests of that length.")
    one_token_continuations: int = Field(default=0, description="loglikelihood requests that score a single token.")
    unique_prefix_tokens: int = Field(
        default=0, description="Context tokens left when prefixes that requests share are counted once."
    )
    largest_token: int = Field(default=0, description="The largest token id of a prompt or continuation.")
    sampled_unasked: bool = Field(
        default=False, description="Generates at temperature 1, for want of do_sample and of temperature."
    )
    task_hash: Sha256 = Field(description="SHA-256 over the resolved task configuration, every prompt and document.")


class CountedTasks(Record):
    """The tasks of one unit as one tokenizer counted them, kept for other models and settings."""

    kind: Literal["counted-tasks"] = "counted-tasks"
    key: Sha256 = Field(description="SHA-256 of everything that decides the counts.")
    tasks: list[TaskFacts]
    sha256: Sha256 = Field(description="Of the key and the tasks.")


class Facts(Record):
    kind: Literal["facts"] = "facts"
    run: str
    model: str
    model_digest: Sha256
    model_facts: ModelFacts
    tasks: list[TaskFacts]


# --- plan ----------------------------------------------------------------------------------------------------------


class Hardware(Part):
    """One node's share for one evaluation job."""

    gpus: int = Field(ge=0, description="GPUs that a job may use; 0 runs the engine on the CPU.")
    gpu_memory_bytes: int = Field(default=0, ge=0, description="Total memory of one GPU as NVML gives it.")
    gpu_name: str | None = None
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    host_memory_bytes: int = Field(gt=0)
    cpus: int = Field(gt=0)
    jobs_per_gpu: int = Field(default=1, ge=1, description="Jobs that may share one GPU if each fits its share.")


class EngineSettings(Part):
    """What the engine is started with. Everything that vLLM would else choose by the machine is fixed here."""

    dtype: Dtype
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int = Field(gt=0)
    max_num_batched_tokens: int = Field(gt=0)
    max_num_seqs: int = Field(gt=0)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(default=None, gt=0)
    enforce_eager: bool
    tensor_parallel_size: int = Field(default=1, gt=0)
    submit_batch: int = Field(gt=0, description="Requests handed to the engine at once; bounds host memory.")
    seed: int = 1234


class Reason(Part):
    """One choice of the planner and, in a sentence with its numbers, why."""

    setting: str
    value: str
    text: str


class PulledLever(Part):
    lever: Lever
    before: str
    after: str
    reason: str
    changes_scores: bool
    requests_cut: int = Field(
        default=0, description="Requests longer than a length cap, which lm-eval cuts from the left."
    )


class MemoryPrediction(Part):
    """Bytes on one GPU at the peak, by part; on a CPU machine `gpu_*` parts are host memory and the context is 0."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    prompt_logprobs_bytes: int
    sampler_bytes: int
    cuda_graphs_bytes: int
    context_bytes: int = Field(description="CUDA context, code of kernels, and NCCL.")
    peak_bytes: int = Field(description="What NVML should show at the peak.")
    host_bytes: int = Field(description="Resident memory of the process tree.")


class TimeEstimate(Part):
    engine_start_s: float
    work_s: float
    gpu_hours: float


class Rung(Part):
    """One step of the ladder: complete settings, and how they differ from the rung before."""

    settings: EngineSettings
    levers: list[PulledLever]
    predicted: MemoryPrediction


Runner = Literal["v1", "v2"]


class Plan(Record):
    """Engine settings for one model, the predicted peak, and what to fall back to."""

    kind: Literal["plan"] = "plan"
    run: str
    model: str
    hardware: Hardware
    policy: str
    tier: str
    parameters: int
    jobs_per_gpu: int = Field(default=1, description="1: the job's GPUs are its own; else it keeps to this share.")
    runner: Runner = Field(default="v2", description="vLLM's model runner. V1 on a CPU, for want of Triton.")
    fits: bool
    advice: str | None = Field(default=None, description="When it cannot run: why, and what would help.")
    levers: list[PulledLever] = Field(description="Pulled already on the first rung.")
    reasons: list[Reason]
    ladder: list[Rung] = Field(description="The first rung is the plan itself; empty when nothing fits.")
    sampled_unasked: list[str] = Field(default=[], description="SUITE/TASK whose facts say so.")
    time: TimeEstimate | None = None


# --- evaluate ------------------------------------------------------------------------------------------------------

FailureClass = Literal[
    "gpu_busy",
    "weights_too_big",
    "no_kv_room",
    "kv_below_one_request",
    "graph_capture",
    "running",
    "host_memory",
    "not_memory",
    "deadline",
    "interrupted",
]

Phase = Literal["start", "weights", "profile", "kv_cache", "capture", "tasks", "end"]


class PhasePeak(Part):
    phase: str = Field(description="A Phase, or task:SUITE/TASK.")
    begin_s: float = Field(description="Since the attempt began.")
    end_s: float
    gpu_peak_bytes: int | None
    host_peak_bytes: int


class Attempt(Part):
    """One start of the engine on one rung."""

    shard: int | None = Field(default=None, description="1, 2, ... where the work is divided over several jobs.")
    rung: int
    settings: EngineSettings
    outcome: Literal["finished", "failed", "interrupted"]
    failure: FailureClass | None = None
    message: str | None = Field(default=None, description="The line of the child's log that decided the class.")
    begin: str = Field(description="UTC, ISO 8601.")
    duration_s: float
    gpu_peak_bytes: int | None = Field(description="Highest use of one GPU by NVML; None without a GPU.")
    host_peak_bytes: int = Field(description="Highest resident memory of the process tree.")
    phases: list[PhasePeak]


class Attempts(Record):
    """Attempts of the jobs of one run so far, kept beside the results: a failed job leaves no evaluation."""

    kind: Literal["attempts"] = "attempts"
    attempts: list[Attempt]


class JobProgress(Record):
    """How far a job of `evaluate` is, for `status`: written over while it runs, left as it was when it is killed."""

    kind: Literal["job-progress"] = "job-progress"
    state: Literal["running", "finished", "failed"]
    doing: str = Field(description="`engine start`, or the entry SUITE/TASK that is evaluated.")
    tasks: int = Field(description="Entries of suites.")
    tasks_done: int
    share: float = Field(ge=0, le=1, description="Of the tokens of all tasks, those kept from earlier jobs included.")
    left_s: float | None = Field(description="At the pace of the last two minutes; None while that says little.")
    begin: str = Field(description="UTC, ISO 8601.")
    slurm_job: str | None
    message: str | None = Field(default=None, description="Why it failed.")


class Score(Part):
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int | None
    higher_is_better: bool | None
    group: bool = False


class ScoringPath(Part):
    """How the requests of one task were scored, in requests."""

    requests: int
    duplicates: int = Field(default=0, description="Answered from an equal request of the same task.")
    cached: int = Field(
        default=0, description="Answered from a request kept earlier, by an interrupted run or for another entry."
    )
    one_token: int = Field(default=0, description="Scored at the generated position: no prompt logits.")
    suffix: int = Field(default=0, description="Only the continuation's prompt rows.")
    stock: int = Field(default=0, description="lm-eval's own request: all prompt rows.")
    second_pass: int = Field(default=0, description="Asked again with the prefix cache unread.")
    cut: int = Field(default=0, description="Cut from the left to fit max_model_len.")
    ended_by_length: int = Field(default=0, description="Generated up to max_gen_toks, without a stop before.")
    sampled: int = Field(default=0, description="Drawn at a temperature above 0: asked again, another answer.")
    not_a_number: int = Field(default=0, description="With a log-probability that is NaN.")


class Container(Part):
    image: str
    digest: str | None
    sif_sha256: Sha256 | None
    runtime: str | None
    network: Literal["off", "on"] | None = Field(
        default=None, description='"off": the process saw no interface but its own loopback.'
    )


class Provenance(Part):
    """Where and with what a result was made. No user name, no path outside the project, no secret."""

    reproval_version: str
    git_commit: str | None
    git_dirty: bool | None
    lock: str | None = Field(description="Name and SHA-256 of the lock that the environment was made from.")
    container: Container | None
    packages: dict[str, str]
    python: str
    platform: str
    cpu: str
    cpus: int
    gpus: list[str]
    driver: str | None
    cuda: str | None
    slurm_job: str | None
    node: str | None = Field(
        default=None, description="As the scheduler names it; a machine's own name is often its owner's, and not kept."
    )
    seeds: dict[str, int]
    batch_invariant: bool
    engine_arguments: dict[str, Any] = Field(description="As the engine had them, not as they were asked for.")
    engine_variables: dict[str, str] = Field(
        default={}, description="Variables VLLM_* that the engine had; of one that holds a path, only that it was set."
    )


class UnitResult(Record):
    """One entry of a suite (a task or a group) for one model; kept as soon as it is done, under its key."""

    kind: Literal["unit-result"] = "unit-result"
    key: Sha256 = Field(description="SHA-256 over `made_of`: another key is another result.")
    made_of: dict[str, Any] = Field(
        description="Everything that decides the scores: model, settings, task, environment."
    )
    model: str
    suite: str
    task: str
    scores: list[Score]
    versions: dict[str, Any]
    n_shot: dict[str, int]
    paths: dict[str, ScoringPath] = Field(description="By leaf task.")
    group_subtasks: dict[str, list[str]]
    task_hashes: dict[str, str]
    score_levers: list[PulledLever] = Field(description="Score-changing levers that were pulled when it was made.")
    begin: str
    duration_s: float = Field(description="Of the engine's work; where it was divided, the sum.")
    provenance: Provenance
    shards: list[Provenance] = Field(
        default=[], description="Of every shard, where the work was divided; `provenance` is then the first's."
    )
    samples_sha256: Sha256
    lm_eval: dict[str, Any] = Field(description="lm-eval's own results, without samples.")

    @property
    def engine(self) -> dict[str, Any]:
        """What `made_of` has of the engine: keep.engine_identity."""
        return dict(self.made_of.get("engine", {}))

    @property
    def made_with(self) -> list[Provenance]:
        """Of every engine that answered for it."""
        return self.shards or [self.provenance]


class UnitReference(Part):
    suite: str
    task: str
    folder: str = Field(description="Relative to the results folder; holds result.json and samples.jsonl.gz.")
    key: Sha256
    reused: bool = Field(description="Kept from an earlier run: nothing was computed for it in this one.")


class Evaluation(Record):
    """All of one model's evaluation: where the results are, what it took, and how it went."""

    kind: Literal["evaluation"] = "evaluation"
    run: str
    model: str
    repeat: int = Field(default=0, ge=0, description="Added to every seed.")
    repeat_of: str | None = Field(default=None, description="The run of repeat 0; None for that one itself.")
    plan: Plan
    units: list[UnitReference]
    attempts: list[Attempt]
    shards: int = Field(default=1, description="Jobs that the work was divided over.")
    begin: str
    duration_s: float = Field(description="Of the job; where the work was divided, the sum.")
    host_peak_bytes: int
    gpu_peak_bytes: int | None


# --- one model's work divided over several jobs ----------------------------------------------------------------------


class Division(Record):
    """How many jobs a run is divided over."""

    kind: Literal["division"] = "division"
    run: str
    asked: int | Literal["auto"]
    shards: int = Field(ge=1)


class ShardUnit(Part):
    """What one shard answered of one entry of a suite."""

    suite: str
    task: str
    key: Sha256
    paths: dict[str, ScoringPath] = Field(description="By leaf task; of this shard's requests.")
    begin: str
    duration_s: float


class ShardAnswers(Record):
    """What a shard's engine did, beside the file of its answers."""

    kind: Literal["shard-answers"] = "shard-answers"
    units: list[ShardUnit]
    provenance: Provenance


class ShardResult(Record):
    """One job of several that divide a run. Its answers and its memory trace are files beside it."""

    kind: Literal["shard-result"] = "shard-result"
    run: str
    shard: int = Field(ge=1)
    shards: int = Field(ge=1)
    rung: int
    settings: EngineSettings
    score_levers: list[PulledLever]
    answered: ShardAnswers | None = Field(description="None if all was kept already: no engine was started.")
    answers_sha256: Sha256
    attempts: list[Attempt]
    begin: str
    duration_s: float
