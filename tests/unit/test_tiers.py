"""Tiers and policies: the published rule, a policy of one's own, and the file's problems."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from architecture_data import facts
from planning import H100, ROOT, TIERS, planned

from reproval.problems import ConfigError
from reproval.tiers import Tiers, load_tiers, schema


def test_size_is_counted_and_the_boundary_belongs_to_the_larger_tier() -> None:
    assert TIERS.tier_of(6_999_999_999).name == "below-7B"
    assert TIERS.tier_of(7_000_000_000).name == "7B-to-13B"
    assert TIERS.tier_of(facts("Llama-2-13b-hf").parameters).name == "7B-to-13B"
    assert TIERS.tier_of(facts("Qwen3-14B").parameters).name == "above-13B"


def test_the_published_rule_is_applied_as_written() -> None:
    small, middle, large = (
        planned(name, H100, policy="published") for name in ("Qwen3-4B", "Meta-Llama-3-8B", "Qwen3-14B")
    )
    assert [plan.ladder[0].settings.enforce_eager for plan in (small, middle, large)] == [True] * 3
    assert [plan.ladder[0].settings.gpu_memory_utilization for plan in (small, middle, large)] == [0.92, 0.8, 0.8]
    assert [plan.ladder[0].settings.max_model_len for plan in (small, middle, large)] == [3008, 3008, 1024]
    assert [lever.requests_cut for lever in large.levers if lever.lever == "max_model_len"] == [1]
    assert [rung.settings.gpu_memory_utilization for rung in middle.ladder] == [0.8, 0.7, 0.6]


def test_a_third_policy_needs_no_code() -> None:
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["mine"] = {
        "summary": "Small steps and an 8-bit cache.",
        "neutral_levers": ["kv_cache_memory_bytes"],
        "free_share": 0.2,
        "start": {"max_num_batched_tokens": 512, "max_num_seqs": 1024, "enforce_eager": False},
        "tiers": {"below-7B": {"start": {"kv_cache_dtype": "fp8"}}},
    }
    plan = planned("Qwen3-4B", H100, policy="mine", tiers=Tiers.model_validate(content))
    chosen = plan.ladder[0].settings
    assert (chosen.max_num_batched_tokens, chosen.kv_cache_dtype, chosen.enforce_eager) == (512, "fp8", False)
    assert chosen.max_num_seqs == 512, "vLLM refuses more requests than tokens"
    assert plan.ladder[0].predicted.peak_bytes <= 0.8 * H100.gpu_memory_bytes
    assert [lever.lever for lever in plan.levers if lever.changes_scores] == ["kv_cache_dtype"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("free_share: 0.05", "fre_share: 0.05"), "did you mean free_share?"),
        (("- max_num_seqs", "- max_num_seq"), "max_num_seq"),
        (("{enforce_eager: true, gpu", "{enforce_eagr: true, gpu"), "did you mean enforce_eager?"),
        (("score_levers: [quantization, max", "score_levrs: [quantization, max"), "did you mean score_levers?"),
        (("  - name: above-13B", "  - name: above-13B\n    below_billions: 10"), "a last tier without"),
        (("    below_billions: 14", ""), "every tier but the last"),
        (("below_billions: 14", "below_billions: 6"), "each larger than the one before"),
        (("below_billions: 14", "below_billions: 7"), "each larger than the one before"),
        (("- name: 7B-to-13B", "- name: below-7B"), "different names"),
        (("      below-7B: {}", "      below-8B: {}"), "not below-8B"),
        (("  published:\n", "  published:\n    summary: twice\n"), "second time"),
        (("tiers:", "tiers: [", ), "indentation"),
    ],
)  # fmt: skip
def test_problems_of_the_tiers_file_name_the_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (ROOT / "config" / "tiers.yaml").read_text()
    assert change[0] in text
    path = tmp_path / "tiers.yaml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError) as caught:
        load_tiers(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean auto"):
        planned("Qwen3-4B", H100, policy="atuo")


def test_the_schema_on_disk_is_the_code_s() -> None:
    assert yaml.safe_load((ROOT / "workflow" / "schemas" / "tiers.schema.yaml").read_text()) == schema()
