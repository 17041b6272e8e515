"""Small valid records for tests, with any field changed by name."""

from __future__ import annotations

from typing import Any

from reproval.records import CacheGroup, EngineSettings, Hardware, ModelFacts, Provenance, TaskFacts, TensorTotal
from reproval.run_file import RunFile
from reproval.settings import ModelConfig, Run, TaskSettings, Unit


def engine_settings(**changes: Any) -> EngineSettings:
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 256,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 2**28,
        "enforce_eager": True,
        "submit_batch": 256,
    }
    return EngineSettings(**(fields | changes))


def model_facts(**changes: Any) -> ModelFacts:
    """SmolLM2-135M."""
    parameters = 134_515_008
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "parameters": parameters,
        "checkpoint_bytes": 2 * parameters,
        "tensors": [TensorTotal(dtype="BF16", tensors=272, elements=parameters, size_bytes=2 * parameters)],
        "linear_parameters": parameters - 49_152 * 576,
        "checkpoint_dtype": "bfloat16",
        "layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "attention_heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tied_embeddings": True,
        "cache": [CacheGroup(kind="full", layers=30, elements_per_token=30 * 2 * 3 * 64)],
    }
    return ModelFacts(**(fields | changes))


def task_facts(**changes: Any) -> TaskFacts:
    fields: dict[str, Any] = {
        "suite": "core",
        "unit": "arc",
        "task": "arc",
        "request_type": "loglikelihood",
        "documents": 25,
        "requests": 100,
        "context_tokens": 5000,
        "continuation_tokens": 400,
        "generation_tokens": 0,
        "longest_request_tokens": 60,
        "lengths": {54: 50, 60: 50},
        "unique_prefix_tokens": 1300,
        "task_hash": "0" * 64,
    }
    return TaskFacts(**(fields | changes))


def provenance_record(**changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "reproval_version": "0.1.0",
        "git_commit": None,
        "git_dirty": None,
        "lock": None,
        "container": None,
        "packages": {},
        "python": "3.11.7",
        "platform": "Linux",
        "cpu": "a CPU",
        "cpus": 2,
        "gpus": [],
        "driver": None,
        "cuda": None,
        "slurm_job": None,
        "seeds": {},
        "batch_invariant": False,
        "engine_arguments": {},
    }
    return Provenance(**(fields | changes))


UNIT = Unit(suite="core", task="arc", include_path=None, unsafe_code=False, settings=TaskSettings(num_fewshot=5))


def run_file(**changes: Any) -> RunFile:
    run = Run(name="m-000000000000", model_name="m", model=ModelConfig(path="m"), units=[UNIT], identity={})
    fields: dict[str, Any] = {
        "run": run,
        "hardware": Hardware(gpus=0, host_memory_bytes=2**33, cpus=2),
        "policy": "auto",
        "seed": None,
        "batch_invariant": False,
        "container": None,
        "environment": "cpu.txt sha256:00",
        "store": "resources",
    }
    return RunFile(**(fields | changes))
