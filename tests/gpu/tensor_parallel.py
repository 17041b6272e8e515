"""One model on one GPU and on two (or more): memory of each GPU beside the plan, and whether the scores agree.

    python tests/gpu/tensor_parallel.py --shapes Qwen3-14B --gpu-memory-gib 139.8 --out tensor_parallel.json
    python tests/gpu/tensor_parallel.py --model FOLDER --gpu-memory-gib 139.8

`--shapes` writes a model with the shapes of a real checkpoint (tests/unit/architectures) and random weights, with the
tokenizer of `--model`; `--layers` keeps only the first ones. The suite is the demo's. Both evaluations are jobs of
`reproval.evaluate`. The plan for several GPUs is the planner's own: memory of one GPU is lowered until the planner asks
for them. `--cpu` rehearses with the CPU engine, where the second plan is the first with more processes.

Printed: for each GPU the predicted and the measured peak, the executor that vLLM chose, every score of both, and the
largest difference between log-probabilities of the same request.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jobs

sys.path[:0] = [str(jobs.REPO / "workflow"), str(jobs.REPO / "tests/unit")]

import architecture_data

from reproval.files import read_record
from reproval.plan import make_plan
from reproval.records import Facts, Plan
from reproval.run_file import RunFile
from reproval.tiers import load_tiers

GIB = 2**30
SHARD_BYTES = 4 * GIB


def write_model(name: str, layers: int | None, tokenizer: Path, folder: Path) -> None:
    """A checkpoint of these shapes with random weights. Norms are ones, so that activations neither grow nor vanish."""
    import torch
    from safetensors.torch import save_file

    config = dict(architecture_data.load(name)["config"])
    layers = min(layers or config["num_hidden_layers"], config["num_hidden_layers"])
    config["num_hidden_layers"] = layers
    for key in ("layer_types",):
        if key in config:
            config[key] = config[key][:layers]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    part: dict[str, Any] = {}
    size = 0

    def save() -> None:
        nonlocal part, size
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(part, str(folder / file), metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
        part, size = {}, 0

    for tensor in architecture_data.tensors(name):
        number = next((int(p) for p in tensor.name.split(".") if p.isdigit()), 0)
        if number >= layers:
            continue
        if "norm" in tensor.name:
            made = torch.ones(tensor.shape, dtype=dtypes[tensor.dtype])
        else:
            made = (
                torch.randn(tensor.shape, generator=generator, device=device).mul_(0.02).to(dtypes[tensor.dtype]).cpu()
            )
        part[tensor.name] = made
        size += made.numel() * made.element_size()
        if size > SHARD_BYTES:
            save()
    save()
    total = {"metadata": {"total_size": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(total | {"weight_map": index}), encoding="utf-8")


def plan_for(run: RunFile, facts: Facts, gpus: int, memory_bytes: int) -> Plan:
    hardware = run.hardware.model_copy(update={"gpus": gpus, "gpu_memory_bytes": memory_bytes})
    tiers = load_tiers(jobs.REPO / "config/tiers.yaml")
    model = run.run.model
    return make_plan(run.run.name, facts.model, facts.model_facts, facts.tasks, hardware, tiers, "auto", model, None)


def parallel_plan(run: RunFile, facts: Facts, gpus: int) -> Plan:
    """The planner's plan for so many GPUs, on the largest of smaller GPUs for which it asks for all of them."""
    whole = run.hardware.gpu_memory_bytes
    for percent in range(100, 0, -1):
        plan = plan_for(run, facts, gpus, whole * percent // 100)
        if plan.ladder and plan.ladder[0].settings.tensor_parallel_size == gpus:
            print(f"a GPU of {whole * percent / 100 / GIB:.1f} GiB would be too small: {plan.ladder[0].levers}")
            return plan
    raise SystemExit("no size of GPU makes the planner ask for several: take a larger model")


def measured(into: Path) -> dict[str, Any]:
    """Peaks by GPU and of the host, the executor, the scores, and the samples of one evaluation."""
    import pyarrow.parquet as pq

    evaluation = json.loads((into / "evaluation.json").read_text(encoding="utf-8"))
    trace = pq.read_table(into / "memory.parquet").to_pydict()
    peaks = {name: max(v or 0 for v in values) for name, values in trace.items() if name.endswith("_bytes")}
    scores, samples, arguments = {}, {}, {}
    for unit in evaluation["units"]:
        folder = into / "results" / unit["folder"]
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        arguments = result["provenance"]["engine_arguments"]
        for score in result["scores"]:
            scores[f"{score['task']} {score['metric']}"] = (score["value"], score["stderr"])
        with gzip.open(folder / "samples.jsonl.gz") as stream:
            for line in stream:
                row = json.loads(line)
                samples[row["task"], row["doc_id"], row["filter"]] = row["resps"]
    chosen = {name: value for name, value in arguments.items() if name.startswith("parallel_config.")}
    rung = evaluation["attempts"][-1]["rung"]
    return {"peaks": peaks, "parallel": chosen, "scores": scores, "samples": samples, "rung": rung}


def numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [each for part in value for each in numbers(part)]
    return [value] if isinstance(value, float) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_arguments(parser)
    parser.add_argument("--shapes", choices=architecture_data.NAMES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tensor-parallel-") as temporary:
        folder = Path(temporary)
        if options.shapes:
            # In a process of its own, which gives the GPU's memory back.
            arguments = (options.shapes, options.layers, options.model, folder / "model")
            writer = multiprocessing.get_context("spawn").Process(target=write_model, args=arguments)
            writer.start()
            writer.join()
            if writer.exitcode:
                raise SystemExit(f"the model was not written: exit code {writer.exitcode}")
            options.model = folder / "model"
        models = {"model": {"path": str(options.model.resolve()), "dtype": options.dtype}}
        run = jobs.planned(options, folder, jobs.demo(), models=models)
        record, facts = read_record(run / "run.json", RunFile), read_record(run / "facts.json", Facts)
        one = read_record(run / "plan.json", Plan)
        if options.cpu:
            settings = one.ladder[0].settings.model_copy(update={"tensor_parallel_size": options.gpus})
            several = one.model_copy(update={"ladder": [one.ladder[0].model_copy(update={"settings": settings})]})
        else:
            several = parallel_plan(record, facts, options.gpus)
        found: dict[int, Any] = {}
        for gpus, plan in ((1, one), (options.gpus, several)):
            if not plan.ladder:
                raise SystemExit(f"no plan for {gpus} GPUs: {plan.advice}")
            into = folder / f"tp{gpus}"
            changed = plan.model_dump(mode="json")
            process = jobs.job(options, run, into, lambda old, new=changed: old.update(new), gpus)
            try:
                _, said = process.communicate(timeout=options.limit)
            except subprocess.TimeoutExpired:
                process.terminate()
                _, said = process.communicate(timeout=60)
            if process.returncode:
                print((into / "engine.log").read_text(encoding="utf-8", errors="replace")[-6000:])
                raise SystemExit(f"the job on {gpus} GPUs ended with {process.returncode}: {said[-2000:]}")
            found[gpus] = measured(into)
            rung = found[gpus]["rung"]
            predicted = plan.ladder[rung].predicted
            print(f"\n{gpus} GPU(s), rung {rung}, {found[gpus]['parallel']}")
            for name, peak in found[gpus]["peaks"].items():
                expected = predicted.host_bytes if name == "host_bytes" else predicted.peak_bytes
                print(f"  {name:12} predicted {expected / GIB:7.2f} GiB   measured {peak / GIB:7.2f} GiB")
            found[gpus]["predicted"] = predicted.model_dump()
    first, second = found[1], found[options.gpus]
    print(f"\n{'score':32} {'1 GPU':>12} {options.gpus:>5} GPUs   stderr")
    for name, (value, stderr) in first["scores"].items():
        told = "" if stderr is None else f"{stderr:.4f}"
        print(f"{name:32} {value:12.6f} {second['scores'][name][0]:12.6f} {told}")
    pairs = [
        (a, b)
        for key, rows in first["samples"].items()
        for a, b in zip(numbers(rows), numbers(second["samples"][key]), strict=True)
    ]
    worst = max((abs(a - b) for a, b in pairs), default=0.0)
    texts = [key for key, rows in first["samples"].items() if not numbers(rows)]
    unequal = sum(first["samples"][key] != second["samples"][key] for key in texts)
    print(f"largest difference of {len(pairs)} log-probabilities: {worst:.4g} nats")
    print(f"{unequal} of {len(texts)} generated texts differ")
    if options.out:
        for each in found.values():
            del each["samples"]
        options.out.write_text(json.dumps({"difference_nats": worst, "runs": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
