"""Seeds: one for all, or those that lm-eval takes when none is given, and both for repeats."""

from __future__ import annotations

# What lm-eval takes when no seed is given (lm_eval/defaults.py): Python's generator, then NumPy, PyTorch, few-shot.
LM_EVAL_SEEDS = (0, 1234, 1234, 1234)
NAMES = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")

# One for all, four in the order of NAMES, or lm-eval's own.
Seed = int | tuple[int, int, int, int] | None


def shifted(seed: int | None, repeat: int) -> Seed:
    """The seeds of a repeat: every one plus `repeat`. Repeat 0 is what is evaluated without repeats."""
    if repeat == 0 or seed is not None:
        return None if seed is None else seed + repeat
    python, numpy, torch, fewshot = (value + repeat for value in LM_EVAL_SEEDS)
    return python, numpy, torch, fewshot


def seeds(seed: Seed) -> dict[str, int]:
    """The four seeds of simple_evaluate, by the names of its arguments."""
    four = LM_EVAL_SEEDS if seed is None else (seed,) * 4 if isinstance(seed, int) else seed
    return dict(zip(NAMES, four, strict=True))


def engine_seed(seed: Seed) -> int | None:
    """vLLM's; None leaves lm-eval's default for it, which is that of PyTorch."""
    return seed if seed is None or isinstance(seed, int) else seeds(seed)["torch_random_seed"]
