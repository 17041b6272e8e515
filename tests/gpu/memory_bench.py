"""Who runs and who runs out of memory: lm-eval's defaults, the published recipe, and reproval's plans, on one GPU.

    python tests/gpu/memory_bench.py --tokenizer MODEL_FOLDER --out memory.json

A side is stock (lm-eval's defaults), recipe (the write-up's), published or auto (plans), or what somebody would try by
hand: `hand-TOKENS-SEQUENCES-eager` or `-graphs`, with vLLM's default utilization and our requests.

Models have the shapes of real checkpoints (tests/unit/architectures) and dummy weights, which allocate what the real
ones would; bitsandbytes reads files, and gets zeros that take no place on the disk. Each case is an engine of its own
in a process group of its own, with a time limit, forked from a process that has imported vLLM and has not touched CUDA.
Printed as it goes: what ran, peak by NVML beside the prediction, prompt tokens a second of long loglikelihood requests,
generated tokens a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "workflow"), str(REPO / "tests/unit")]

import architecture_data

from reproval import failures, memory
from reproval.model_tensors import ITEM_BITS, Tensor
from reproval.plan import make_plan
from reproval.records import Hardware, Plan, TaskFacts
from reproval.settings import ModelConfig
from reproval.tiers import load_tiers

GIB = 1024**3
# The recipe of the write-up, as it was given there for every model.
RECIPE = {"enforce_eager": True, "max_model_len": 1024, "gpu_memory_utilization": 0.6, "dtype": "float32"}


def work(options: argparse.Namespace) -> list[TaskFacts]:
    """Long loglikelihood requests, and generations of medium length."""

    def facts(task: str, **fields: Any) -> TaskFacts:
        common = {"suite": "bench", "unit": task, "task": task, "task_hash": "0" * 64, "unique_prefix_tokens": 0}
        return TaskFacts(**(common | fields))

    n, long, m = options.requests * options.times, options.tokens, options.generations * options.times
    return [
        facts(
            "loglikelihood",
            request_type="loglikelihood",
            documents=n,
            requests=n,
            context_tokens=n * (long - 8),
            continuation_tokens=8 * n,
            generation_tokens=0,
            longest_request_tokens=long,
            lengths={long: n},
        ),
        facts(
            "generation",
            request_type="generate_until",
            documents=m,
            requests=m,
            context_tokens=500 * m,
            continuation_tokens=0,
            generation_tokens=256 * m,
            longest_request_tokens=756,
            lengths={756: m},
        ),
    ]


def plan_of(name: str, policy: str, hardware: Hardware, options: argparse.Namespace) -> Plan:
    return make_plan(
        run=name,
        model=name,
        facts=architecture_data.facts(name),
        tasks=work(options),
        hardware=hardware,
        tiers=load_tiers(REPO / "config/tiers.yaml"),
        policy=policy,
        asked=ModelConfig(path="dummy"),
        seed=None,
        scoring="suffix" if policy == "auto" else "stock",
        runner="v1" if options.runner == "v1" else None,
    )


def model_folder(name: str, tokenizer: Path, parent: Path) -> Path:
    """config.json of the shape and the tokenizer of a real model; the weights are dummies."""
    folder = parent / name
    folder.mkdir(exist_ok=True)
    config = dict(architecture_data.load(name)["config"])
    config.setdefault("eos_token_id", 2)
    config.setdefault("bos_token_id", 1)
    (folder / "config.json").write_text(json.dumps(config))
    for entry in tokenizer.glob("*token*"):
        shutil.copy(entry, folder / entry.name)
    return folder


def zero_weights(folder: Path, tensors: list[Tensor]) -> None:
    """Sparse safetensors files of these tensors, all zeros, a layer or so in each."""
    for number in range(0, len(tensors), 32):
        header, end = {}, 0
        for tensor in tensors[number : number + 32]:
            begin, end = end, end + tensor.elements * ITEM_BITS[tensor.dtype] // 8
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        content = json.dumps(header).encode()
        with (folder / f"model-{number:05}.safetensors").open("wb") as stream:
            stream.write(len(content).to_bytes(8, "little") + content)
            stream.truncate(stream.tell() + end)


def run_case(side: str, folder: Path, plan: Plan | None, options: argparse.Namespace) -> dict[str, Any]:
    """In the forked child: start the engine, score, generate; returns speeds. Raises whatever the engine raises."""
    from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams, TokensPrompt

    from reproval.engine import settings_arguments
    from reproval.scoring import ReprovalVLLM

    begin = time.monotonic()
    arguments: dict[str, Any] = {"load_format": "dummy"}
    if plan is not None:
        settings = plan.ladder[0].settings
        arguments |= settings_arguments(settings)
        if settings.quantization == "bitsandbytes":
            arguments["load_format"] = "bitsandbytes"
            zero_weights(folder, architecture_data.tensors(folder.name))
        model: Any = (
            ReprovalVLLM(str(folder), submit_batch=settings.submit_batch, **arguments)
            if side == "auto"
            else VLLM(str(folder), **arguments)
        )
    elif side.startswith("hand-"):
        batched, sequences, mode = side.split("-")[1:]
        model = ReprovalVLLM(
            str(folder),
            **arguments,
            max_model_len=min(options.tokens + 16, architecture_data.facts(folder.name).max_position_embeddings),
            max_num_batched_tokens=int(batched),
            max_num_seqs=int(sequences),
            enforce_eager=mode == "eager",
        )
    else:
        model = VLLM(str(folder), **arguments, **(RECIPE if side == "recipe" else {}))
    ready = time.monotonic()
    vocabulary = architecture_data.facts(folder.name).vocab_size
    limit = model.max_length
    size = min(500, limit - 256)
    sampling = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)

    def tokens(seed: int, count: int) -> list[int]:
        return [1000 + (seed * 7919 + i * 104729) % (vocabulary - 2000) for i in range(count)]

    def seconds(first: int, requests: int, generations: int) -> tuple[float, float, int]:
        """Of scoring and of generating, and how many tokens were generated. No two rounds share a prompt."""
        long = [(("", ""), tokens(n, options.tokens - 8), tokens(n + 999, 8)) for n in range(first, first + requests)]
        prompts = [
            TokensPrompt(prompt_token_ids=tokens(n, size)) for n in range(first + 50_000, first + 50_000 + generations)
        ]
        started = time.monotonic()
        model._loglikelihood_tokens(long, disable_tqdm=True)
        scored = time.monotonic()
        outputs = model.model.generate(prompts, sampling, use_tqdm=False)
        ended = time.monotonic()
        return scored - started, ended - scored, sum(len(output.outputs[0].token_ids) for output in outputs)

    # One of each before the clock: the first case on a machine compiles kernels that the others find.
    seconds(100_000, 1, 1)
    rounds = [seconds(1000 * n, options.requests, options.generations) for n in range(options.rounds)]
    scoring, generating = (min(each) for each in list(zip(*rounds, strict=True))[:2])
    return {
        "start_s": round(ready - begin, 1),
        "loglikelihood_tokens_per_s": round(options.requests * min(options.tokens, limit) / scoring),
        "generated_tokens_per_s": round(rounds[0][2] / generating),
        "rounds_s": [[round(scored, 2), round(generated, 2)] for scored, generated, _ in rounds],
        "max_model_len": limit,
    }


def attempt(
    side: str, name: str, folder: Path, plan: Plan | None, options: argparse.Namespace, logs: Path
) -> dict[str, Any]:
    """Fork a child for one case, sample the GPU while it runs, and leave nothing of it behind."""
    log, out = logs / f"{name}-{side}-{options.runner}.log", logs / "case.json"
    out.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        code = 1
        try:
            out.write_text(json.dumps(run_case(side, folder, plan, options)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    gpus = memory.Gpus(1, os.environ) if not options.cpu else None
    sampler = memory.Sampler(os.getpid(), gpus)
    status: int | None = None
    deadline = time.monotonic() + options.limit
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
        time.sleep(0.05)
    peaks = sampler.stop()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    if gpus is not None:
        gpus.close()
    peak = max((p.gpu_peak_bytes if gpus is not None else p.host_peak_bytes) or 0 for p in peaks)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    result: dict[str, Any] = {"model": name, "side": side, "runner": options.runner, "peak_gib": round(peak / GIB, 2)}
    if plan is not None:
        predicted = plan.ladder[0].predicted
        result["predicted_gib"] = round((predicted.host_bytes if options.cpu else predicted.peak_bytes) / GIB, 2)
        result["levers"] = [f"{lever.lever}={lever.after}" for lever in plan.levers]
        result["settings"] = plan.ladder[0].settings.model_dump(exclude_none=True)
    if status == 0 and out.exists():
        return result | {"outcome": "ran"} | json.loads(out.read_text())
    if status is None:
        return result | {"outcome": f"no end within {options.limit} s"}
    kind, line = failures.classify(lines, 1, None, False, "tasks")
    return result | {"outcome": kind, "message": line}


def show(result: dict[str, Any]) -> None:
    predicted = result.get("predicted_gib")
    against = f" predicted {predicted} ({100 * (result['peak_gib'] / predicted - 1):+.1f} %)" if predicted else ""
    rates = "".join(f" {key}={result[key]}" for key in result if key.endswith("_s") and key != "rounds_s")
    text = f"{result['model']:32} {result['side']:9} {result['runner']} {result['outcome']:12}"
    text += f" peak {result['peak_gib']} GiB{against}{rates} {' '.join(result.get('levers', []))}"
    print(f"{text} {result.get('message') or ''}"[:400], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a model whose tokenizer all shapes use"
    )
    parser.add_argument(
        "--cases", default="Qwen3-4B:stock,auto", help="MODEL:SIDE,SIDE;MODEL:SIDE with v1/ before a SIDE"
    )
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8000, help="of one loglikelihood request")
    parser.add_argument("--generations", type=int, default=128)
    parser.add_argument(
        "--times", type=int, default=1, help="plan for so many times the work that is run: whether graphs pay"
    )
    parser.add_argument("--rounds", type=int, default=1, help="measured so many times in a case; the fastest is shown")
    parser.add_argument("--gpu", default="NVIDIA H100 80GB HBM3", help="name, by which the plan knows its speed")
    parser.add_argument("--memory-gib", type=float, default=79.6)
    parser.add_argument("--limit", type=float, default=150, help="seconds for one case")
    parser.add_argument("--cpu", action="store_true", help="the CPU engine, to rehearse")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    import lm_eval.models.vllm_causallms  # noqa: F401  (imported once, before the forks)

    import reproval.scoring  # noqa: F401

    hardware = Hardware(
        gpus=0 if options.cpu else 1,
        gpu_name=None if options.cpu else options.gpu,
        gpu_memory_bytes=0 if options.cpu else round(options.memory_gib * GIB),
        compute_capability=None if options.cpu else "9.0",
        host_memory_bytes=(16 if options.cpu else 120) * GIB,
        cpus=os.cpu_count() or 1,
    )
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        parent = Path(temporary)
        for case in options.cases.split(";"):
            name, _, sides = case.partition(":")
            folder = model_folder(name, options.tokenizer, parent)
            for entry in sides.split(","):
                side = entry.removeprefix("v1/")
                options.runner = "v1" if options.cpu or entry.startswith("v1/") else "v2"
                os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
                if entry.startswith("v1/"):
                    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
                plan = plan_of(name, side, hardware, options) if side in ("published", "auto") else None
                if plan is not None and not plan.fits:
                    result = {"model": name, "side": side, "runner": options.runner, "peak_gib": 0.0}
                    result |= {"outcome": "refused", "message": plan.advice}
                else:
                    result = attempt(side, name, folder, plan, options, parent)
                results.append(result)
                show(result)
                if options.out:
                    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
