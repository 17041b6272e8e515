"""The generation keys that a configuration may hold are those that the installed lm-eval and vLLM take."""

from __future__ import annotations

from typing import Any

import pytest

from reproval.settings import Generation

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = pytest.mark.engine

EXAMPLE: dict[str, Any] = {
    "until": ["Q:"],
    "max_gen_toks": 8,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "seed": 3,
    "min_tokens": 1,
    "ignore_eos": True,
    "bad_words": ["no"],
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": True,
}


def sampling(generation: dict[str, Any]) -> Any:
    """What lm-eval's vLLM backend makes of gen_kwargs."""
    from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams

    kwargs, until, max_gen_toks = VLLM.modify_gen_kwargs(generation, eos="<eos>")
    return SamplingParams(max_tokens=max_gen_toks, stop=until, **kwargs)


def test_every_key_reaches_the_engine() -> None:
    assert set(EXAMPLE) == set(Generation.model_fields)
    generation = Generation.model_validate(EXAMPLE, strict=True).model_dump(exclude_none=True)
    made = sampling(generation)
    assert made.max_tokens == 8
    assert set(made.stop) == {"Q:", "<eos>"}
    for key, value in EXAMPLE.items():
        if key not in ("until", "max_gen_toks", "do_sample"):
            assert getattr(made, key) == value, key


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("min_p", 1.1), ("temperature", 2.1), ("repetition_penalty", 0.0)],
)
def test_ranges_are_those_of_the_engine(key: str, value: float) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(ValueError, match=key):
        Generation.model_validate({key: value}, strict=True)
    with pytest.raises(VLLMValidationError, match=key):
        sampling({"do_sample": True, "temperature": 0.5, key: value})


def test_temperature_without_sampling_is_lost() -> None:
    """Why a configuration must say do_sample: true with a temperature."""
    assert sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
