"""What a user may write in config.yaml: the one definition of every key, its type, default and meaning.

`workflow/schemas/config.schema.yaml` is generated from these models for editors and readers. Reading files, merging,
and turning a violation into a message that helps is the work of `config.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from reproval.records import Dtype

# A name becomes a folder: no separators, no leading dot or dash, nothing a shell or a file system treats specially.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """One model to evaluate: from the Hugging Face Hub (`hub`) or from a local folder (`path`)."""

    hub: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$|^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Hugging Face Hub id, such as Qwen/Qwen3-4B. Needs `revision`.",
    )
    path: Text | None = Field(
        default=None,
        description="Local folder with config.json, tokenizer and safetensors; relative to the working directory.",
    )
    revision: str | None = Field(
        default=None,
        description="Commit of the Hub repository, 40 hex digits. A branch or tag needs `allow_floating: true`.",
    )
    allow_floating: bool = Field(
        default=False, description="Accept a branch or tag as revision. What it pointed to is recorded, not promised."
    )
    dtype: Dtype | Literal["auto"] = Field(
        default="auto",
        description="Weights and activations; `auto` takes the checkpoint's, and 16 bit for float32, as vLLM does.",
    )
    quantization: Literal["fp8", "bitsandbytes"] | None = Field(
        default=None,
        description="Quantize a 16-bit checkpoint while loading. Changes scores. "
        "A checkpoint that is quantized already needs nothing.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        description="Length cap in tokens; default: the plan decides. Changes scores if it cuts requests.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the checkpoint. Off unless asked for each model."
    )
    enable_thinking: bool | None = Field(
        default=None,
        description="Whether the model thinks before it answers, for a chat template that asks; true needs "
        "`think_end_token`. Changes scores.",
    )
    think_end_token: Text | None = Field(
        default=None,
        description="Text that ends the thoughts of a model, such as `</think>`. What follows it is judged, and no "
        "text of `until` ends a thought. Changes scores.",
    )
    chat_template_args: dict[str, str | int | float | bool] | None = Field(
        default=None,
        description="Other variables of the chat template, such as `{reasoning_effort: high}`. Changes scores.",
    )
    gated: bool = Field(
        default=False, description="The Hub asks for a token: `stage` fails early if HF_TOKEN is not set."
    )
    suites: list[Name] | None = Field(default=None, min_length=1, description="Suites this model runs; default: all.")

    @property
    def thinking(self) -> dict[str, Any]:
        """How it is told to think, as arguments of lm-eval's model; empty for a model of which nothing is said."""
        names = {"enable_thinking", "think_end_token", "chat_template_args"}
        return self.model_dump(include=names, exclude_none=True)


class Generation(Section):
    """lm-eval's gen_kwargs, as far as vLLM knows them. What is left out, or null, stays as the task has it.

    Names and ranges are those of lm-eval's `normalize_gen_kwargs` and vLLM's `SamplingParams`.
    """

    until: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="Text that ends an answer."
    )
    max_gen_toks: int | None = Field(default=None, ge=1, description="The most tokens of one answer.")
    do_sample: bool | None = Field(
        default=None,
        description="false takes the most likely token. Where neither a task nor this nor `temperature` says anything, "
        "lm-eval's vLLM model samples at temperature 1.",
    )
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 takes the most likely token.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Share of probability to sample from.")
    top_k: int | None = Field(default=None, ge=-1, description="Most likely tokens to sample from; 0: all of them.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Least probability, relative to the likeliest.")
    repetition_penalty: float | None = Field(default=None, gt=0, description="Above 1: against repetition.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Above 0: against tokens used.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="The same, by how often used.")
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1, description="Seed of each request's own sampling.")
    min_tokens: int | None = Field(default=None, ge=0, description="The least tokens of one answer.")
    ignore_eos: bool | None = Field(default=None, description="Go on after the end-of-text token.")
    bad_words: list[Text] | None = Field(default=None, description="Text that is never generated.")
    skip_special_tokens: bool | None = Field(default=None, description="Leave special tokens out of the answer.")
    spaces_between_special_tokens: bool | None = Field(default=None, description="Put spaces between them.")
    include_stop_str_in_output: bool | None = Field(default=None, description="Keep the text that ended the answer.")


class TaskSettings(Section):
    """Settings of lm-eval's that decide what the model is asked. What is left out stays as the task has it."""

    num_fewshot: int | None = Field(default=None, ge=0, le=1000, description="Few-shot examples.")
    limit: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="First N documents of each task (below 1: a fraction). For trying out, not for publishing.",
    )
    apply_chat_template: bool | Text | None = Field(
        default=None, description="Use the tokenizer's chat template, or the one with this name."
    )
    fewshot_as_multiturn: bool | None = Field(
        default=None, description="Few-shot examples as turns of a conversation; needs apply_chat_template."
    )
    system_instruction: Text | None = Field(default=None, description="System message put before every prompt.")
    generation: dict[str, str | int | float | bool | list[str] | None] | None = Field(
        default=None,
        description="lm-eval's gen_kwargs, for tasks that generate text.",
    )


class TaskEntry(TaskSettings):
    """One task of a suite with settings of its own, which win over the suite's; null gives the task's own back."""

    task: Text = Field(description="lm-eval task, group or tag name.")


class SuiteConfig(TaskSettings):
    """A list of lm-eval tasks and the settings that they share."""

    tasks: list[Text | TaskEntry] = Field(
        min_length=1, description="lm-eval task or group names, or entries with settings of their own."
    )
    include_path: Text | None = Field(
        default=None,
        description="Folder with task files of one's own, as lm-eval's --include_path; relative to the working "
        "directory, else to the workflow's folder.",
    )
    unsafe_code: bool = Field(
        default=False, description="Allow tasks that run code written by the model (lm-eval's confirm_run_unsafe_code)."
    )

    def setting_of(self, task: str, name: str) -> Any:
        """What a task of the suite is asked with: its own setting, else the suite's; None: as the task has it."""
        for entry in self.tasks:
            if isinstance(entry, TaskEntry) and entry.task == task and name in entry.model_fields_set:
                return getattr(entry, name)
        return getattr(self, name)


class HardwareConfig(Section):
    """What one evaluation job may use. The plan is made for this, before a GPU is asked for."""

    gpus: int = Field(default=0, ge=0, le=1024, description="GPUs for one job; 0 runs vLLM's CPU build.")
    gpu_memory_gib: float | None = Field(
        default=None,
        gt=0,
        le=1024,
        description="Memory of one GPU in GiB, as nvidia-smi gives it (an 80 GB H100: 79.6).",
    )
    gpu_name: Text | None = Field(
        default=None,
        description="As nvidia-smi gives it. Estimates of time go by it, and with them time limits, CUDA graphs and "
        "`shards: auto`; without it an A100 is assumed.",
    )
    compute_capability: str | None = Field(
        default=None,
        pattern=r"^\d+\.\d+$",
        description="Such as 9.0 (Hopper). Without it fp8 is never chosen, and what must be quantized gets 4 bit.",
    )
    host_memory_gib: float = Field(default=16, gt=0, le=65536, description="Host memory for one job in GiB.")
    cpus: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="CPU cores of a job that has all `gpus`, or needs none; one with fewer gets its share.",
    )
    jobs_per_gpu: int = Field(
        default=1,
        ge=1,
        le=10,
        description="Jobs that may share one GPU of this machine. A model that fits its share of the memory is planned "
        "for that; any other has its GPUs for itself. Not on a cluster, whose scheduler gives a GPU to one job.",
    )


class ContainerConfig(Section):
    """The image that the jobs run in with --use-singularity."""

    image: Text = Field(
        description="docker://NAME@sha256:DIGEST, oras://NAME@sha256:DIGEST, or the path of a .sif file."
    )
    sif_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the .sif file; required for one."
    )


ExportFormat = Literal["every-eval-ever", "ro-crate", "mlflow", "wandb"]


class ExportConfig(Section):
    """What `snakemake export` writes. `mlflow` and `wandb` need `envs/install export`."""

    formats: list[ExportFormat] = Field(
        default=["every-eval-ever", "ro-crate"], min_length=1, description="What to write, see docs/exports.md."
    )
    organization: Text = Field(
        default="unknown", description="Who evaluated, for the records of Every Eval Ever: a name to be published."
    )
    organization_url: Text | None = Field(default=None, description="Its address.")
    relationship: Literal["first_party", "third_party", "collaborative", "other"] = Field(
        default="other", description="The evaluator's relationship to those who made the models."
    )
    samples: bool = Field(
        default=False,
        description="Questions and answers too. Some data sets forbid publishing their questions.",
    )


class Config(Section):
    """The whole of config.yaml."""

    models: dict[Name, ModelConfig] = Field(
        min_length=1, description="Models by a name of your choice, which names their results."
    )
    suites: dict[Name, SuiteConfig] = Field(min_length=1, description="Suites of tasks by a name of your choice.")
    hardware: HardwareConfig = Field(default=HardwareConfig(), description=HardwareConfig.__doc__)
    tiers: Text = Field(
        default="config/tiers.yaml",
        description="File with size tiers and policies; relative to the working directory, else the workflow's folder.",
    )
    policy: Text = Field(default="auto", description="Policy of that file to plan by.")
    container: ContainerConfig | None = Field(
        default=None, description="Image for --use-singularity; default: what containers/build made."
    )
    store: Text = Field(
        default="resources", description="Folder for models and data sets, relative to the working directory."
    )
    local_copy: str | None = Field(
        default=None,
        pattern=r"^(\$TMPDIR|/[^$~]*)$",
        description="Folder on the disk of the node, `$TMPDIR` or an absolute path: a job copies its model there, "
        "checks every byte, and removes it at its end. For a shared file system that many jobs read at once.",
    )
    silence_limit_h: float | None = Field(
        default=None,
        gt=0,
        description="End an engine that for so many hours logged nothing and finished no request, as one that hangs in "
        "NCCL, a driver or a file system; default: the scheduler's time limit alone.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="One seed for the engine, few-shot sampling, Python, NumPy and PyTorch; default: lm-eval's own.",
    )
    repeats: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Evaluate every model this often, repeat k with every seed plus k: the noise that no sample shows.",
    )
    batch_invariant: bool = Field(
        default=False,
        description="VLLM_BATCH_INVARIANT=1: the same bits whatever the batch (compute capability 8.0 and up).",
    )
    shards: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = Field(
        default=1,
        description="Jobs that one model's requests are divided over, which may run at once on different GPUs and are "
        "merged to the scores of one job; `auto` makes a job take about two hours, by the plan's estimate.",
    )
    export: ExportConfig = Field(default=ExportConfig(), description=ExportConfig.__doc__)
    reference: Text | None = Field(
        default=None,
        description="File of a published evaluation (config/references/): its models and suites are run, and "
        "`reproduce` judges them. For --config.",
    )
    bundle: Text | None = Field(
        default=None,
        description="The same from a bundle that another machine made with `snakemake bundle`. For --config.",
    )
    doctor: Literal["quick", "deep"] = Field(
        default="quick",
        description="`deep`: `snakemake doctor` reads every byte of the store and compares it with its SHA-256. "
        "For --config.",
    )
    margin: float | None = Field(
        default=None,
        gt=0,
        description="Largest difference of a score, or share of a perplexity, that `reproduce` counts as none; "
        "default: the reference's, else 0.02.",
    )


class Unit(Section):
    """One entry of a suite with its settings resolved: what is evaluated, kept and reported as one."""

    suite: str
    task: str
    include_path: str | None
    include_sha256: str | None = Field(default=None, description="Over the names and contents of all files there.")
    unsafe_code: bool
    settings: TaskSettings

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.task}"


class Run(Section):
    """One model with everything it is to be evaluated on: one engine start, one job."""

    name: str = Field(description="MODEL-HASH12, the folder name of its results.")
    model_name: str
    model: ModelConfig
    units: list[Unit]
    identity: dict[str, Any] = Field(description="What the hash is made of.")
    repeat: int = Field(default=0, ge=0, description="Added to every seed.")
    repeat_of: str | None = Field(default=None, description="The run of repeat 0; None for that one itself.")
