"""Failures are told apart by the engine's log: each class, what vLLM really wrote, and what must not mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reproval.failures import answers, classify, is_fatal, message_of, patterns, phase_after
from reproval.records import EngineSettings, FailureClass, Phase

# What the engine logs on its way up on a GPU (texts of vLLM 0.32.0), by the phase that each line begins.
CORE, WORKER = "(EngineCore pid=7) ", "(Worker_TP0 pid=9) "
LOG: dict[Phase, str] = {
    "start": "(MainProcess pid=5) INFO 11-22 23:58:43 [api_utils.py:286] non-default args: {'dtype': 'bfloat16'}",
    "weights": WORKER + "INFO 11-22 23:58:57 [gpu_model_runner.py:5039] Starting to load model Qwen/Qwen3-4B...",
    "profile": WORKER + "INFO 11-22 23:58:58 [model_runner.py:424] Model loading took 7.56 GiB memory and 2.1 seconds",
    "kv_cache": CORE + "INFO 11-22 23:58:59 [kv_cache_utils.py:2327] GPU KV cache size: 46,592 tokens, Maximum ...",
    "capture": WORKER + "INFO 11-22 23:59:09 [model_runner.py:1127] Graph capturing finished in 6 secs, took 0.80 GiB",
    "tasks": CORE
    + "INFO 11-22 23:59:10 [core.py:402] init engine (profile, create kv cache, warmup model) took 2.11 s",
}
ERROR = "ERROR 11-22 23:59:20 [core.py:1510] "
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.53 GiB. GPU 0 has a total capacity of 79.18 GiB."
PARENT = [
    "Traceback (most recent call last):",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
]
DEAD = [
    "Traceback (most recent call last):",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root "
    "cause.",
]


def up_to(phase: Phase) -> list[str]:
    phases = list(LOG)
    return [LOG[name] for name in phases[: phases.index(phase) + 1]]


def traceback(*functions: str, error: str = OOM) -> list[str]:
    frames = [f'{CORE}{ERROR}  File "/x/vllm/v1/worker/gpu_worker.py", line 99, in {name}' for name in functions]
    return [f"{CORE}{ERROR}Traceback (most recent call last):", *frames, f"{CORE}{ERROR}{error}"]


def failed(lines: list[str], phase: Phase = "start") -> FailureClass:
    return classify(lines, 1, None, False, phase)[0]


# --- phases --------------------------------------------------------------------------------------------------------


def test_every_phase_is_seen_in_the_log() -> None:
    phase: Phase = "start"
    for expected, line in LOG.items():
        phase = phase_after(line, phase)
        assert phase == expected


def test_the_phases_of_a_cpu_engine() -> None:
    lines = [
        "INFO [cpu_model_runner.py:68] Starting to load model /models/smol...",
        "INFO [cpu_worker.py:260] Explicitly set (1.0/8.84) GiB for KV cache on node 0.",
        "INFO [kv_cache_utils.py:2327] CPU KV cache size: 46,592 tokens, Maximum concurrency for 1,024 tokens: 45.50x",
        "INFO [core.py:402] init engine (profile, create kv cache, warmup model) took 2.11 s",
    ]
    phase: Phase = "start"
    seen = [phase := phase_after(line, phase) for line in lines]
    assert seen == ["weights", "kv_cache", "kv_cache", "tasks"]


def test_a_phase_never_goes_back_and_graphs_captured_to_profile_are_no_capture() -> None:
    assert phase_after(LOG["weights"], "tasks") == "tasks"
    assert phase_after("Capturing CUDA graphs (FULL):   0%|", "profile") == "profile"
    assert phase_after("Capturing CUDA graphs (FULL):   0%|", "kv_cache") == "capture"
    assert phase_after("nothing to see", "weights") == "weights"


# --- the table -----------------------------------------------------------------------------------------------------

NO_ROOM = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when ..."
TEXTS: list[tuple[str, FailureClass]] = [
    (
        "ValueError: Free memory on device cuda:0 (4.1/79.18 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 72.85 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "gpu_busy",
    ),
    (
        "AssertionError: Error in memory profiling. Initial free memory 40.1 GiB, current free memory 61.2 GiB. This "
        "happens when other processes sharing the same container release GPU memory while vLLM is profiling",
        "gpu_busy",
    ),
    (
        "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for "
        "weights, ... (original error: CUDA out of memory. Tried to allocate 96.00 MiB.)",
        "weights_too_big",
    ),
    (NO_ROOM, "no_kv_room"),
    (
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.5 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (2.1 GiB).",
        "kv_below_one_request",
    ),
    (
        "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token.",
        "kv_below_one_request",
    ),
    (
        "ValueError: max_num_seqs (256) exceeds available Mamba cache blocks (97). Each decode sequence requires one "
        "Mamba cache block, so CUDA graph capture cannot proceed. Please lower max_num_seqs to at most 97 or increase "
        "gpu_memory_utilization.",
        "graph_capture",
    ),
    (
        "ValueError: Available memory on node 0 (3.1/15.6 GiB) on startup is less than desired CPU memory utilization "
        "(0.92, 14.4 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory",
        "host_memory",
    ),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory", "host_memory"),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to "
        "allocate 68719476736 bytes.",
        "host_memory",
    ),
    ("OSError: [Errno 12] Cannot allocate memory", "host_memory"),
    ("MemoryError", "host_memory"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "host_memory"),
    ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 9 GiB", "host_memory"),
    ("Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.", "host_memory"),
    ("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}", "host_memory"),
    (
        "VLLMValidationError: This model's maximum context length is 2048 tokens. However, your prompt contains 9000",
        "not_memory",
    ),
    (
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 163840, Hardware limit: 1",
        "not_memory",
    ),
    ("torch._inductor.exc.InductorError: OutOfResources: out of resources: threads, Required: 2048", "not_memory"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[text[:40] for text, _ in TEXTS])
def test_a_text_that_names_its_cause_wins_over_its_parents(text: str, expected: FailureClass) -> None:
    lines = [*up_to("profile"), f"{CORE}{ERROR}{text}", *PARENT]
    assert classify(lines, 1, None, False, "profile") == (expected, text)


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("start", "gpu_busy"),
        ("weights", "weights_too_big"),
        ("profile", "no_kv_room"),
        ("kv_cache", "graph_capture"),
        ("capture", "graph_capture"),
        ("tasks", "running"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        OOM,
        "torch.OutOfMemoryError",
        "torch.AcceleratorError: CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "RuntimeError: cudaErrorMemoryAllocation: out of memory",
        "Cuda failure 2 'out of memory'",
        "Cuda failure 'out of memory'",
    ],
)
def test_memory_that_ends_is_classed_by_how_far_the_log_came(phase: Phase, expected: FailureClass, text: str) -> None:
    assert failed([*up_to(phase), f"{WORKER}{ERROR}{text}", *PARENT], phase) == expected


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        (["init_device"], "gpu_busy"),
        (["load_model", "create_weights"], "weights_too_big"),
        (["determine_available_memory"], "no_kv_room"),
        (["profile_run", "_dummy_run"], "no_kv_room"),
        (["determine_available_memory", "profile_cudagraph_memory", "capture_model"], "graph_capture"),
        (["initialize_from_config", "initialize_kv_cache"], "no_kv_room"),
        (["initialize_from_config", "compile_or_warm_up_model", "capture_model", "_dummy_run"], "graph_capture"),
        (["compile_or_warm_up_model", "_dummy_sampler_run"], "running"),
        (["compile_or_warm_up_model", "warmup_kernels", "execute_model"], "running"),
        (["run_busy_loop", "execute_model", "_get_prompt_logprobs_dict"], "running"),
        (["run_busy_loop", "sample_tokens"], "running"),
    ],
)
def test_the_innermost_known_frame_decides_before_the_phase(functions: list[str], expected: FailureClass) -> None:
    phases: tuple[Phase, ...] = ("start", "weights", "kv_cache")
    assert {failed([*up_to(phase), *traceback(*functions), *PARENT], phase) for phase in phases} == {expected}


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: Triton Error [CUDA]: out of memory",
        "RuntimeError: CUDA driver error: out of memory",
        "RuntimeError: CUDA_ERROR_OUT_OF_MEMORY: the kernel cannot be loaded",
    ],
)
def test_memory_that_the_driver_lacks_is_memory_too(error: str) -> None:
    """A kernel that is loaded on its first use takes memory outside of PyTorch's allocator."""
    lines = [*up_to("tasks"), *traceback("run_busy_loop", "execute_model", error=error), *DEAD]
    assert classify(lines, 1, None, False, "tasks") == ("running", error)


def test_another_rank_that_is_further_does_not_mislead() -> None:
    assert (
        failed([*up_to("weights"), LOG["profile"], *traceback("load_model"), *PARENT], "profile") == "weights_too_big"
    )


def test_another_rank_that_goes_on_does_not_hide_the_cause() -> None:
    lines = [*up_to("profile"), *traceback("determine_available_memory"), LOG["kv_cache"], LOG["capture"], *PARENT]
    assert failed(lines, "capture") == "no_kv_room"
    # Without frames, what counts is how far the log had come at that line.
    assert failed([*up_to("profile"), f"{WORKER}{ERROR}{OOM}", LOG["capture"], *PARENT], "capture") == "no_kv_room"


def test_tasks_that_the_events_told_of_count_though_the_log_has_no_line_of_it() -> None:
    assert failed([*up_to("weights"), f"{WORKER}{ERROR}{OOM}", *DEAD], "tasks") == "running"


def test_the_collapse_after_the_cause_does_not_replace_it() -> None:
    lines = [
        *up_to("kv_cache"),
        *traceback("initialize_kv_cache"),
        f"{CORE}{ERROR}Traceback (most recent call last):",
        "ncclUnhandledCudaError: Call to CUDA function failed.",
        "Cuda failure 'out of memory'",
        f"{CORE}{ERROR}RuntimeError: Worker failed with error 'CUDA out of memory. Tried to allocate 1 GiB', please",
        *PARENT,
    ]
    assert classify(lines, 1, None, False, "kv_cache") == ("no_kv_room", OOM)


def test_while_running_the_parents_see_only_a_dead_engine() -> None:
    lines = [*up_to("tasks"), *traceback("run_busy_loop", "execute_model"), *DEAD]
    assert classify(lines, 1, None, False, "tasks") == ("running", OOM)


def test_a_failure_that_the_engine_survived_is_not_the_cause() -> None:
    lines = [*up_to("profile"), *traceback("determine_available_memory"), LOG["tasks"], "KeyError: 'acc'"]
    assert classify(lines, 1, None, False, "tasks") == ("not_memory", "KeyError: 'acc' (exit code 1)")


@pytest.mark.parametrize(
    "after",
    [
        "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
        "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}",
    ],
)
def test_a_worker_that_is_killed_after_the_cause_is_not_the_cause(after: str) -> None:
    assert failed([*up_to("profile"), *traceback("profile_run"), f"{ERROR}{after}", *PARENT]) == "no_kv_room"


def test_of_two_causes_the_last_counts() -> None:
    assert failed([TEXTS[0][0], NO_ROOM, *PARENT]) == "no_kv_room"


# --- how it ended --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("returncode", "signal"), [(None, 9), (137, None)])
def test_a_sigkill_without_a_traceback_is_the_hosts_memory(returncode: int | None, signal: int | None) -> None:
    assert classify(up_to("weights"), returncode, signal, False, "weights")[0] == "host_memory"
    assert classify([*up_to("tasks"), *traceback("execute_model")], returncode, signal, False, "tasks")[0] == "running"
    assert classify(["ValueError: bad task"], returncode, signal, False, "start")[0] == "not_memory"


def test_an_engine_that_vanished_was_killed_though_its_parents_have_words_for_it() -> None:
    vanished = "RuntimeError: engine core exited unexpectedly"
    assert failed([*up_to("tasks"), vanished, *DEAD], "tasks") == "host_memory"
    assert classify([*up_to("tasks"), *DEAD], None, 9, False, "tasks")[0] == "host_memory"
    assert failed([*up_to("tasks"), "KeyError: 'acc'", vanished, *DEAD], "tasks") == "not_memory"


def test_a_kill_by_the_kernel_explains_a_dead_engine_but_not_a_full_gpu() -> None:
    failure, message = classify([*up_to("tasks"), *DEAD], 1, None, True, "tasks")
    assert failure == "host_memory"
    assert "oom_kill" in message
    assert classify([*up_to("tasks"), *traceback("execute_model"), *DEAD], 1, None, True, "tasks")[0] == "running"


@pytest.mark.parametrize("signal", [15, 2, 1])
def test_a_signal_from_outside_is_an_interruption(signal: int) -> None:
    assert classify(up_to("tasks"), None, signal, False, "tasks")[0] == "interrupted"


def test_a_segmentation_fault_is_not_of_memory_and_names_itself() -> None:
    lines = [*up_to("tasks"), "Fatal Python error: Segmentation fault", ""]
    assert classify(lines, None, 11, False, "tasks") == (
        "not_memory",
        "Fatal Python error: Segmentation fault (killed by SIGSEGV)",
    )


def test_an_error_of_ones_own_is_told_rather_than_the_parents_words() -> None:
    lines = [f"{CORE}{ERROR}ValueError: Unrecognized quantization method: fp7", *PARENT]
    assert (
        classify(lines, 1, None, False, "start")[1] == "ValueError: Unrecognized quantization method: fp7 (exit code 1)"
    )
    assert "Engine core initialization failed" in classify(PARENT, 1, None, False, "start")[1]
    assert classify([], 3, None, False, "start") == ("not_memory", "exit code 3, and nothing in the log says why")


@pytest.mark.parametrize(
    "words",
    [
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the",
        "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace",
        "RuntimeError: Worker failed with error 'Unrecognized', please check the stack trace above for the root cause",
    ],
)
def test_what_a_parent_says_of_its_child_is_not_the_message(words: str) -> None:
    lines = [f"{CORE}{ERROR}ValueError: Unrecognized", f"{CORE}{ERROR}{words}"]
    assert classify(lines, 1, None, False, "start")[1] == "ValueError: Unrecognized (exit code 1)"


@pytest.mark.parametrize(
    ("line", "fatal"),
    [
        (f"{CORE}{ERROR}EngineCore failed to start.", True),
        (f"{CORE}{ERROR}EngineCore encountered a fatal error.", True),
        (f"{CORE}{ERROR}Worker proc VllmWorker-1 died unexpectedly (exit code: 1), shutting down executor.", True),
        (f"{ERROR}[shutdown] MPClient: engine core exited unexpectedly; starting cleanup", True),
        (f"{CORE}{ERROR}{OOM}", False),
        (LOG["tasks"], False),
    ],
)
def test_an_engine_is_known_to_be_gone_by_its_log(line: str, fatal: bool) -> None:
    """From then on its child has a deadline."""
    assert is_fatal(line) == fatal


@pytest.mark.parametrize(
    "line",
    [
        "(EngineCore pid=15218) ERROR 11-23 00:25:31 [core.py:1510] ValueError: x",
        "ERROR 11-23 00:25:31 [core.py:1510] ValueError: x",
        "(EngineCore pid=15218) ValueError: x",
        "  ValueError: x\n",
    ],
)
def test_a_message_is_the_line_without_its_prefix(line: str) -> None:
    assert message_of(line) == "ValueError: x"


# --- what can help -------------------------------------------------------------------------------------------------

CHOSEN = EngineSettings(
    dtype="float32",
    max_model_len=4096,
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    gpu_memory_utilization=0.8,
    enforce_eager=False,
    submit_batch=1000,
)
GIVEN = CHOSEN.model_copy(update={"gpu_memory_utilization": None, "kv_cache_memory_bytes": 2**30})
WHILE_STARTING = {"no_kv_room", "kv_below_one_request"}
"""Classes whose cache is what the rest leaves of the memory: whatever takes less leaves more."""


@pytest.mark.parametrize(
    ("before", "change", "helps"),
    [
        (CHOSEN, {"tensor_parallel_size": 2}, {"weights_too_big", "running"} | WHILE_STARTING),
        (CHOSEN, {"quantization": "fp8"}, {"weights_too_big", "running"} | WHILE_STARTING),
        (CHOSEN, {"dtype": "bfloat16"}, {"weights_too_big", "running"} | WHILE_STARTING),
        (CHOSEN, {"max_num_batched_tokens": 2048}, {"running"} | WHILE_STARTING),
        (CHOSEN, {"max_num_seqs": 64}, {"running"} | WHILE_STARTING),
        (CHOSEN, {"enforce_eager": True}, {"graph_capture"} | WHILE_STARTING),
        (CHOSEN, {"gpu_memory_utilization": 0.9}, WHILE_STARTING),
        (CHOSEN, {"gpu_memory_utilization": 0.7}, {"running"}),
        (CHOSEN, {"max_model_len": 2048}, {"running", "kv_below_one_request"}),
        (CHOSEN, {"kv_cache_dtype": "fp8"}, {"kv_below_one_request"}),
        (CHOSEN, {"submit_batch": 250}, {"host_memory"}),
        (GIVEN, {"kv_cache_memory_bytes": 2**29}, {"running", "no_kv_room"}),
        (GIVEN, {"kv_cache_memory_bytes": 2**31}, {"kv_below_one_request"}),
        (GIVEN, {"max_model_len": 2048}, {"running", "kv_below_one_request"}),
        (GIVEN, {"kv_cache_dtype": "fp8"}, {"kv_below_one_request"}),
        (GIVEN, {"tensor_parallel_size": 2}, {"weights_too_big", "running"} | WHILE_STARTING),
        # A cache of given size is no larger for what the rest leaves.
        (GIVEN, {"max_num_batched_tokens": 2048, "enforce_eager": True}, {"running", "no_kv_room", "graph_capture"}),
        # More of anything but GPUs and cache, a dtype of as many bytes, or graphs instead of none: never.
        (CHOSEN, {"max_num_batched_tokens": 16384, "max_num_seqs": 512, "max_model_len": 8192}, set()),
        (CHOSEN, {"submit_batch": 4000}, set()),
        (CHOSEN.model_copy(update={"dtype": "float16"}), {"dtype": "bfloat16"}, set()),
        (CHOSEN.model_copy(update={"tensor_parallel_size": 2}), {"tensor_parallel_size": 1}, set()),
        (CHOSEN, {}, set()),
    ],
    ids=str,
)
def test_what_can_help_against_a_failure(before: EngineSettings, change: dict[str, Any], helps: set[str]) -> None:
    after = before.model_copy(update=change)
    classes = ("weights_too_big", "no_kv_room", "kv_below_one_request", "graph_capture", "running", "host_memory")
    assert {each for each in classes if answers(each, before, after, on_cpu=False)} == helps


def test_of_eager_settings_those_that_stay_eager_answer_nothing() -> None:
    eager = CHOSEN.model_copy(update={"enforce_eager": True})
    fewer = eager.model_copy(update={"max_num_seqs": 64})
    assert answers("graph_capture", eager, fewer, on_cpu=False), "memory ended while the engine warmed up"
    assert not answers("graph_capture", CHOSEN, CHOSEN.model_copy(update={"max_num_seqs": 64}), on_cpu=False)
    assert not answers("no_kv_room", eager, eager.model_copy(update={"submit_batch": 1}), on_cpu=False)


@pytest.mark.parametrize(
    "change",
    [{"submit_batch": 250}, {"max_num_batched_tokens": 2048}, {"max_num_seqs": 64}, {"max_model_len": 2048},
     {"kv_cache_memory_bytes": 2**29}, {"quantization": "fp8"}, {"dtype": "bfloat16"}],
    ids=str,
)  # fmt: skip
def test_on_a_cpu_whatever_shrinks_the_engine_helps_the_host(change: dict[str, Any]) -> None:
    after = GIVEN.model_copy(update=change)
    assert answers("host_memory", GIVEN, after, on_cpu=True)
    assert answers("host_memory", GIVEN, after, on_cpu=False) == (change == {"submit_batch": 250})


def test_every_class_of_memory_has_an_answer() -> None:
    known = patterns()
    named = {cause.failure for cause in known.causes + known.frames} | set(known.out_of_memory_by_phase.values())
    assert named - {"not_memory", "gpu_busy"} <= set(known.answers)


# --- what vLLM 0.32.0 wrote (real runs; paths shortened). gpu_*: an H200 or H100, by tests/gpu/ladder_bench.py --------

REAL = Path(__file__).parent / "engine_logs"


@pytest.mark.parametrize(
    ("name", "returncode", "phase", "expected", "message"),
    [
        ("kv_below_one_request", 1, "kv_cache", "kv_below_one_request", "ValueError: To serve at least one request"),
        ("kv_space_of_one_mib", 1, "kv_cache", "no_kv_room", "ValueError: No available memory for the cache blocks"),
        ("kv_space_above_the_host", 1, "weights", "no_kv_room", "ValueError: Available memory on node 0"),
        ("engine_core_killed", None, "tasks", "host_memory", "the engine's process was killed without a traceback"),
        ("gpu_gpu_busy", 1, "start", "gpu_busy", "ValueError: Free memory on device cuda:0 (19.49/139.8 GiB)"),
        (
            "gpu_kv_below_one_request",
            1,
            "kv_cache",
            "kv_below_one_request",
            "ValueError: To serve at least one request",
        ),
        (
            "gpu_no_kv_room",
            1,
            "kv_cache",
            "no_kv_room",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to",
        ),
        ("gpu_weights_too_big", 1, "weights", "weights_too_big", "torch.OutOfMemoryError: CUDA out of memory."),
        ("gpu_running", 1, "tasks", "running", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 96"),
        ("gpu_graph_capture", 1, "capture", "graph_capture", "Exception in aoti_torch: CUDA out of memory."),
    ],
)
def test_real_logs(name: str, returncode: int | None, phase: Phase, expected: FailureClass, message: str) -> None:
    lines = (REAL / f"{name}.log").read_text(encoding="utf-8").splitlines()
    seen: Phase = "start"
    for line in lines:
        seen = phase_after(line, seen)
    assert seen == phase
    failure, decided = classify(lines, returncode, None, False, phase)
    assert failure == expected
    assert decided.startswith(message)


def test_an_exception_behind_torchs_rank_is_named() -> None:
    lines = [
        "[rank0]: Traceback (most recent call last):",
        "[rank0]: torch._inductor.exc.InductorError: No C++ compiler",
    ]
    found = classify(lines, 1, None, False, "tasks")
    assert found == ("not_memory", "torch._inductor.exc.InductorError: No C++ compiler (exit code 1)")
