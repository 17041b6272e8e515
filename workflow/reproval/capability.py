"""What a GPU can do, by NVIDIA's compute capability: text such as "9.0" in the configuration and the records."""

from __future__ import annotations

# The GPU environment's PyTorch and vLLM are built with CUDA 13, which has no code for what is older than Turing.
OLDEST = (7, 5)
BFLOAT16 = (8, 0)
# Ada; below it vLLM keeps fp8 weights only and computes in 16 bit, which gives other scores.
FP8 = (8, 9)
BATCH_INVARIANT = (8, 0)


def lacks(capability: object, needed: tuple[int, int]) -> bool:
    """Whether a capability is known, and is below the one that is needed."""
    if not isinstance(capability, str):
        return False
    major, minor = capability.split(".")
    return (int(major), int(minor)) < needed
