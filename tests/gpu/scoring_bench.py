"""ReprovalVLLM against lm-eval's own vLLM model on one machine: speed, differences, peak memory.

    python tests/gpu/scoring_bench.py --real MODEL_FOLDER --mmlu DATA/mmlu --out bench.json

Both sides run in one process on one engine, with the prefix cache emptied before each. Shapes of larger models run
with dummy weights, so only their times and memory mean something. Each model is a process group of its own with a
time limit. `--probe` compares edge cases instead, in about a minute; `--rehearse` runs everything in tiny counts.
`--processes N` divides MMLU among N engines that run at once on the one GPU: for the differences over all of it, since
stock alone keeps one core busy and the GPU idle; the seconds of such rows are those of a shared machine. Engines that
share a GPU need `--cache-gib`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "workflow"))

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000,
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    },
    "qwen3-32b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    },
}  # fmt: skip
CASES = ("mmlu5", "mmlu_continuation", "arc25", "arc25_fixed", "zero1", "hellaswag", "lambada", "gsm8k", "perplexity")
# Sides beside ours and stock: where nobody reads is_greedy, rows can be read in two ways; "ours" chooses itself.
MORE_SIDES = {"perplexity": ["ours_ids", "ours_mixed"]}
DIFFERENCES = ("max_difference", "max_relative", "different_values", "changed_answers", "changed_greedy", "of")
# Documents of a case, by model: so that all takes about eight minutes on an H100.
SCALE = {"real": 2.0, "qwen3-4b": 1.0, "llama-3-8b": 0.5, "qwen3-32b": 0.15}


def say(*words: object) -> None:
    print(*words, flush=True)


# --- work -------------------------------------------------------------------------------------------------------------


class Writer:
    """Texts of a known length: every word is one token of the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.random = random.Random(1234)
        texts = (tokenizer.decode([token]) for token in range(500, 30000))
        self.words = [text for text in texts if text.startswith(" ") and text[1:].isalpha() and text.islower()][:8000]

    def text(self, tokens: int) -> str:
        return "".join(self.random.choices(self.words, k=tokens))


def choices_of(task: str, number: int, context: str, choices: list[str]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, (context, c), i, (task, number, 1)) for i, c in enumerate(choices)]


def mmlu(questions: int, letters: bool, writer: Writer, options: argparse.Namespace) -> list[Any]:
    """5 shots in lm-eval's layout, choices as letters (mmlu) or as their texts (mmlu_continuation).

    `questions` 0: all; else as many from each subject as make up the number. The questions of a subject share its
    shots: a few of each subject share less than all of some subjects, which `--subjects` takes. Of several processes,
    each takes a part of every subject.
    """
    folder = options.mmlu
    requests: list[Any] = []
    if folder is None:
        for number in range(questions or 1000):
            if number % 250 == 0:
                shots = writer.text(650)
            choices = [f" {letter}" if letters else writer.text(8) for letter in "ABCD"]
            requests += choices_of("mmlu", number, shots + writer.text(110), choices)
        return requests

    def choices_of_row(row: dict[str, Any]) -> list[str]:
        return [f" {choice}" for choice in ("ABCD" if letters else row["choices"])]

    def shown(row: dict[str, Any], answered: bool) -> str:
        question = row["question"].strip()
        lines = [f"Question: {question}", "Answer:"]
        if letters:
            lines = [question, *(f"{a}. {c}" for a, c in zip("ABCD", row["choices"], strict=True)), "Answer:"]
        return "\n".join(lines) + (f"{choices_of_row(row)[row['answer']]}\n\n" if answered else "")

    subjects = sorted((folder / "test").glob("*.jsonl"))
    if options.subjects:
        subjects = [subjects[len(subjects) * index // options.subjects] for index in range(options.subjects)]
    for index, path in enumerate(subjects):
        name = path.stem.replace("_", " ")
        dev = [json.loads(line) for line in (folder / "dev" / path.name).open(encoding="utf-8")]
        kind = "multiple choice questions" if letters else "questions"
        head = f"The following are {kind} (with answers) about {name}.\n\n"
        shots = head + "".join(shown(row, True) for row in dev[:5])
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]
        if questions:
            rows = rows[: (questions * (index + 1)) // len(subjects) - (questions * index) // len(subjects)]
        for number, row in enumerate(rows):
            if number % options.processes != options.part:
                continue
            context = shots + shown(row, False)
            requests += choices_of(f"mmlu_{path.stem}", number, context, choices_of_row(row))
    return requests


def work(case: str, count: int, writer: Writer, options: argparse.Namespace, max_len: int) -> tuple[str, list[Any]]:
    """(lm-eval method, requests) of one case; `count` is the number of documents."""
    from lm_eval.api.instance import Instance

    requests: list[Any] = []
    if case in ("mmlu5", "mmlu_continuation"):
        return "loglikelihood", mmlu(count, case == "mmlu5", writer, options)
    if case in ("arc25", "arc25_fixed"):
        # lm-eval draws ARC's shots anew for every question; a task with fixed shots shares them.
        shots = [writer.text(75) + "\n\n" for _ in range(100)]
        fixed = shots[: min(25, max_len // 90)]
        for number in range(count):
            drawn = fixed if case == "arc25_fixed" else writer.random.sample(shots, len(fixed))
            choices = [writer.text(writer.random.randint(2, 8)) for _ in range(4)]
            requests += choices_of(case, number, "".join(drawn) + writer.text(40), choices)
    elif case == "zero1":
        for number in range(count):
            requests += choices_of(case, number, writer.text(100), [" A", " B", " C", " D"])
    elif case == "hellaswag":
        for number in range(count):
            requests += choices_of(case, number, writer.text(80), [writer.text(24) for _ in range(4)])
    elif case == "lambada":
        for number in range(count):
            requests += choices_of(case, number, writer.text(85), [writer.text(1 + number % 2)])
    elif case == "gsm8k":
        shots_text = writer.text(min(800, max_len // 2))
        settings = {"until": ["Question:", "</s>"], "max_gen_toks": min(128, max_len // 4), "do_sample": False}
        for number in range(count):
            context = shots_text + writer.text(90)
            requests.append(Instance("generate_until", {}, (context, dict(settings)), 0, (case, number, 1)))
        return "generate_until", requests
    elif case == "perplexity":
        for number in range(count):
            text = writer.text(writer.random.randint(200, 2 * max_len))
            requests.append(Instance("loglikelihood_rolling", {}, (text,), 0, (case, number, 1)))
        return "loglikelihood_rolling", requests
    return "loglikelihood", requests


# --- measuring --------------------------------------------------------------------------------------------------------


class PeakMemory:
    """Peak of the GPU's used memory by NVML while it is open, and of this process's host memory."""

    def __init__(self) -> None:
        self.gpu = 0
        self.host = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        import psutil
        import torch

        from reproval.memory import Gpus

        process = psutil.Process()
        gpus = Gpus(1, os.environ) if torch.cuda.is_available() else None
        while not self._stop.wait(0.02):
            self.host = max(self.host, process.memory_info().rss)
            if gpus is not None:
                self.gpu = max(self.gpu, *gpus.used_bytes())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def timed_encoding(lm: Any) -> Iterator[list[float]]:
    """Seconds spent in the tokenizer (on this side's own thread or another)."""
    spent = [0.0]
    plain = lm.tok_encode

    def encode(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - begin

    lm.tok_encode = encode
    try:
        yield spent
    finally:
        del lm.tok_encode


def run_side(lm: Any, side: str, method: str, requests: list[Any]) -> dict[str, Any]:
    """Run one side: stock; ours; ours_ids and ours_mixed, which fix how rows are read where is_greedy is not."""
    import torch

    lm.scoring = {"ours_ids": "token_ids", "ours_mixed": "prompt_logprobs"}.get(
        side, "stock" if side.startswith("stock") else "auto"
    )
    lm.batch_size = 64 if side == "stock_64" else "auto"
    lm.reset_paths()
    lm.model.reset_prefix_cache()
    gc.collect()
    before = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with PeakMemory() as memory, timed_encoding(lm) as encoding:
        begin = time.perf_counter()
        results = getattr(lm, method)(requests, disable_tqdm=True)
        seconds = time.perf_counter() - begin
    paths: dict[str, int] = {}
    for path in lm.paths.values():
        for key, value in path.model_dump().items():
            paths[key] = paths.get(key, 0) + value
    return {
        "side": side,
        "seconds": round(seconds, 3),
        "encoding_s": round(encoding[0], 3),
        "gpu_peak_bytes": memory.gpu,
        # Weights and cache fill the GPU on both sides; this is what the requests took beside them.
        "requests_peak_bytes": torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0,
        "host_peak_bytes": memory.host,
        "paths": paths,
        "results": results,
    }


def answers(requests: list[Any], results: list[Any]) -> list[int]:
    """Index of the likeliest choice of every document."""
    documents: dict[tuple[Any, Any], list[float]] = {}
    for request, (value, _) in zip(requests, results, strict=True):
        documents.setdefault((request.task_name, request.doc_id), []).append(value)
    return [max(range(len(values)), key=values.__getitem__) for values in documents.values()]


def compare(method: str, requests: list[Any], left: list[Any], right: list[Any]) -> dict[str, Any]:
    if method == "generate_until":
        return {"changed_answers": sum(a != b for a, b in zip(left, right, strict=True)), "of": len(left)}
    if method == "loglikelihood_rolling":
        pairs = list(zip(left, right, strict=True))
        relative = max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
        return {"max_difference": max(abs(a - b) for a, b in pairs), "max_relative": relative, "of": len(left)}
    chosen = list(zip(answers(requests, left), answers(requests, right), strict=True))
    return {
        "max_difference": max(abs(a[0] - b[0]) for a, b in zip(left, right, strict=True)),
        "different_values": sum(a[0] != b[0] for a, b in zip(left, right, strict=True)),
        "changed_answers": sum(a != b for a, b in chosen),
        "changed_greedy": sum(a[1] != b[1] for a, b in zip(left, right, strict=True)),
        "of": len(chosen),
    }


def told(row: dict[str, Any]) -> str:
    """The rest of a row, for people."""
    parts = [f"{key.replace('_', ' ')} {row[key]:{'.3g' if 'max' in key else ''}}" for key in DIFFERENCES if key in row]
    if "encoding_s" in row:
        parts.append(f"encoding {row['encoding_s']:.2f} s")
        peaks = [row[f"{kind}_peak_bytes"] / 2**30 for kind in ("gpu", "requests", "host")]
        parts.append("GPU {:.2f} GiB ({:.2f} of it for requests), host {:.2f} GiB".format(*peaks))
    return ", ".join([*parts, " ".join(f"{key}={value}" for key, value in row["paths"].items() if value)])


def bench_case(
    lm: Any, case: str, method: str, requests: list[Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    # Ours first: the process keeps what the allocator once took, so the later side shows the higher peak of both.
    sides = ["ours", *MORE_SIDES.get(case, []), "stock", *(["stock_64"] if options.noise else [])]
    # Kernels are compiled and chosen at their first use: for generation, at every number of running requests.
    for side in ("ours", "stock"):
        run_side(lm, side, method, requests if method == "generate_until" else requests[:8])
    runs: dict[str, dict[str, Any]] = {}
    for number in range(options.rounds):
        # What slows the one that comes first slows the other in the next round.
        for side in reversed(sides) if number % 2 else sides:
            run = run_side(lm, side, method, requests)
            run["all_seconds"] = [*runs.get(side, {}).get("all_seconds", []), run["seconds"]]
            run["seconds"] = min(run["all_seconds"])
            runs[side] = run
    stock = runs["stock"]
    rows = []
    for side in sides:
        run = runs[side]
        row = {key: value for key, value in run.items() if key != "results"}
        row |= {"case": case, "requests": len(requests), "ratio": round(stock["seconds"] / run["seconds"], 3)}
        if side != "stock":
            row |= compare(method, requests, run["results"], stock["results"])
        rows.append(row)
        say(
            f"  {case:12} {side:12} {len(requests):6} requests {run['seconds']:8.2f} s {row['ratio']:7.2f}x {told(row)}"
        )
    return rows


# --- probe ------------------------------------------------------------------------------------------------------------


def rolling_of(texts: list[str]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("roll", i, 1)) for i, text in enumerate(texts)]


def probe(lm: Any) -> Iterator[dict[str, Any]]:
    """Edge cases in every way of scoring against stock. Prints what differs."""
    writer = Writer(lm.tokenizer)
    block = lm._block_size
    cases: dict[str, list[Any]] = {}
    for tokens in (1, block - 1, block, block + 1, 2 * block, 3 * block + 5):
        context = writer.text(tokens).strip()
        base = writer.text(3)
        endings = [base + writer.text(2), base + writer.text(2), base, writer.text(1), writer.text(20), writer.text(1)]
        cases[f"context_{tokens}_shared"] = choices_of("probe", tokens, context, endings)
        cases[f"rolling_{tokens}_shared"] = rolling_of([context + ending for ending in endings])
    long = writer.text(5 * block)
    cases["many_choices"] = choices_of("probe", 0, long, sorted(set(writer.words[:140])))
    cases["many_long_choices"] = choices_of("probe", 0, long, [word + " of the end" for word in writer.words[:30]])
    cases["one_token"] = choices_of("probe", 0, writer.text(60), [" A", " B", " C", " D"])
    cases["empty_context"] = choices_of("probe", 0, "", ["Hello world", "Hello there", "Good day"])
    cases["cut"] = choices_of("probe", 0, writer.text(lm.max_length + 50), [" end of it", " end", writer.text(10)])
    cases["all_but_cut"] = choices_of("probe", 0, "x", [writer.text(lm.max_length + 20)])
    cases["chunked"] = choices_of("probe", 0, writer.text(lm.max_length - 300), [writer.text(200), writer.text(250)])
    cases["repeat"] = cases["many_long_choices"] + cases["many_long_choices"]
    cases["greedy"] = choices_of(
        "probe", 0, "Monday, Tuesday, Wednesday, Thursday", [" Friday", ", Friday, Saturday, Sunday", ", Friday, dog"]
    )
    cases["rolling_long"] = rolling_of([writer.text(3 * lm.max_length), writer.text(lm.max_length), writer.text(2)])
    for name, requests in cases.items():
        method = requests[0].request_type
        try:
            stock = run_side(lm, "stock", method, requests)["results"]
        except Exception:
            say(f"  {name}: stock failed\n{traceback.format_exc()}")
            continue
        sides = ("ours", "ours_ids", "ours_mixed") if method == "loglikelihood_rolling" else ("ours",)
        # One request at a time, none knows of the others: what the second pass is for.
        for side, batch in itertools.product(sides, (2048, 1)):
            if batch == 1 and len(requests) > 8:
                continue
            row: dict[str, Any] = {"case": name, "side": side, "submit_batch": batch}
            try:
                lm.submit_batch = batch
                run = run_side(lm, side, method, requests)
                row |= {"paths": run["paths"], **compare(method, requests, run["results"], stock)}
                same = row["max_difference"] == 0 and not row.get("changed_greedy")
                say(f"  {name:20} {side:10} batch={batch:4} {'equal' if same else 'DIFFERS'} {told(row)}")
            except Exception:
                row["error"] = traceback.format_exc()
                say(f"  {name} {side} batch={batch} FAILED\n{row['error']}")
            yield row


# --- processes --------------------------------------------------------------------------------------------------------


def start(model: str, options: argparse.Namespace) -> Any:
    from reproval.scoring import ReprovalVLLM

    real = model == "real"
    folder = options.real
    if not real:
        folder = Path(tempfile.mkdtemp(prefix=f"{model}-"))
        config = {**SHAPES[model], "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_batched_tokens": options.batched_tokens,
        "enforce_eager": not options.graphs,
        "seed": 1234,
    }
    if not real:
        arguments |= {"load_format": "dummy", "tokenizer": str(options.real)}
    if options.cache_gib:
        # Given in bytes, the engine does not measure what is free, which other engines change while they start.
        arguments |= {"kv_cache_memory_bytes": round(options.cache_gib * 2**30), "gpu_memory_utilization": 0.01}
    begin = time.perf_counter()
    lm = ReprovalVLLM(str(folder), submit_batch=options.submit_batch, **arguments)
    say(
        f"{model}: engine up in {time.perf_counter() - begin:.0f} s, {'V2' if lm._v2 else 'V1'} runner, block "
        f"{lm._block_size}, batch invariant {os.environ.get('VLLM_BATCH_INVARIANT', '0')}, "
        f"KV blocks {lm._engine_config.cache_config.num_gpu_blocks}"
    )
    return lm


def child(model: str, options: argparse.Namespace) -> None:
    lm = start(model, options)
    rows: list[dict[str, Any]] = []
    out = Path(options.child_out)
    if options.probe:
        for row in probe(lm):
            rows.append(row)
            out.write_text(json.dumps(rows), encoding="utf-8")
    else:
        for case in options.cases:
            try:
                writer = Writer(lm.tokenizer)
                method, requests = work(case, options.counts_by_model[model][case], writer, options, lm.max_length)
                rows += bench_case(lm, case, method, requests, options)
            except Exception:
                rows.append({"case": case, "error": traceback.format_exc()})
                say(f"  {case} FAILED\n{traceback.format_exc()}")
            out.write_text(json.dumps(rows), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # The engine's own shutdown may hang; the parent ends the group.


def run_parts(model: str, options: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """Run the parts of one model at once; gives all their rows, and their differences together."""
    if options.processes == 1:
        return run_model(model, options, argv)
    with ThreadPoolExecutor(options.processes) as pool:
        parts = [
            pool.submit(run_model, model, options, [*argv, "--part", str(part)]) for part in range(options.processes)
        ]
        rows = [row for part in parts for row in part.result()]
    for side in dict.fromkeys(row["side"] for row in rows if "side" in row and row["side"] != "stock"):
        of = [row for row in rows if row.get("side") == side]
        whole = {
            name: (max if name.startswith("max_") else sum)(row[name] for row in of)
            for name in DIFFERENCES
            if name in of[0]
        }
        paths: dict[str, int] = {}
        for row in of:
            for name, count in row["paths"].items():
                paths[name] = paths.get(name, 0) + count
        say(f"{model}, {len(of)} processes together: {side} {told(whole | {'paths': paths})}")
    return rows


def run_model(model: str, options: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """Run one model in a process group of its own; what it has measured is kept even if it is ended."""
    out = Path(tempfile.mkdtemp(prefix="bench-")) / "rows.json"
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **os.environ,
    }
    command = [sys.executable, __file__, *argv, "--child", model, "--child-out", str(out)]
    log = out.with_name("stderr.log")  # Progress bars and the engine's own log.
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stderr=stream, start_new_session=True)
    try:
        code = process.wait(timeout=options.limit)
        if code:
            text = log.read_text(encoding="utf-8", errors="replace")
            say(f"{model}: ended with status {code}; the end of its log:\n{text[-6000:]}")
    except subprocess.TimeoutExpired:
        say(f"{model}: time limit of {options.limit} s reached")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    return [{"model": model, **row} for row in rows]


def counts_of(text: str) -> dict[str, int]:
    return {case: int(number) for case, _, number in (part.partition("=") for part in text.split(",") if part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--real", type=Path, required=True, help="folder of a real model; its tokenizer serves all shapes"
    )
    parser.add_argument("--models", default="real,qwen3-4b,llama-3-8b,qwen3-32b")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument(
        "--counts", default="", help="documents by case: mmlu5=200,hellaswag=300; mmlu5=0 is all of MMLU"
    )
    parser.add_argument("--mmlu", type=Path, help="folder with test/ and dev/ of JSON lines; synthetic without")
    parser.add_argument("--subjects", type=int, help="so many of MMLU's subjects, evenly chosen; default: all")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--submit-batch", type=int, default=2048)
    parser.add_argument("--cache-gib", type=float, help="KV cache of each engine; default: what vLLM makes of 0.92")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--graphs", action="store_true", help="torch.compile and CUDA graphs, as for long work")
    parser.add_argument("--limit", type=float, default=200, help="seconds for one model")
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs; the fastest counts")
    parser.add_argument("--noise", action="store_true", help="also stock at batch_size=64: what another batch changes")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="engines at once, each with a part of MMLU")
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="the real model only, tiny counts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    tiny = {
        "mmlu5": 6,
        "mmlu_continuation": 6,
        "arc25": 2,
        "arc25_fixed": 2,
        "zero1": 6,
        "hellaswag": 6,
        "lambada": 6,
        "gsm8k": 3,
        "perplexity": 2,
    }
    full = {
        "mmlu5": 200, "mmlu_continuation": 100, "arc25": 60, "arc25_fixed": 60, "zero1": 400, "hellaswag": 300,
        "lambada": 400, "gsm8k": 128, "perplexity": 40,
    }  # fmt: skip
    asked = counts_of(options.counts)
    options.counts_by_model = {
        model: {case: max(round(number * scale), 8) for case, number in full.items()} | asked
        for model, scale in SCALE.items()
    }
    if options.rehearse:
        options.counts_by_model = {"real": tiny | asked}
    if options.rehearse:
        options.models, options.max_model_len = "real", min(options.max_model_len, 1024)
    if options.probe:
        options.models = "real"
        options.max_model_len = min(options.max_model_len, 1024)
        options.batched_tokens = min(options.batched_tokens, 512)
    if options.child:
        child(options.child, options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the model's process group is ended too.
    rows: list[dict[str, Any]] = []
    for model in options.models.split(","):
        rows += run_parts(model, options, sys.argv[1:])
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in rows if "error" in row]
    say(f"{len(rows)} measurements, {len(failed)} failed" + (f"; written to {options.out}" if options.out else ""))
    sys.exit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()
