"""A model outside the list is refused before any work, and told why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError, RecipeError
from edgedistill.families import FAMILIES
from edgedistill.recipe_load import load_recipe
from edgedistill.student import Student, write_json
from edgedistill.unknown_family import missing_facts
from tests.recipes import write_recipe
from tests.tiny import FAMILY_CONFIGS


def _config(kind: str) -> dict[str, Any]:
    """The defaults of ``transformers``."""
    from transformers import AutoConfig

    config: dict[str, Any] = AutoConfig.for_model(kind).to_dict()
    return config


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("mamba", ["state-space layers (state_size 16)"]),
        ("mixtral", ["experts (num_local_experts 8)"]),
        ("qwen3_moe", ["experts (num_local_experts 128)"]),
        ("deepseek_v3", ["experts (n_routed_experts 256)", "latent attention (kv_lora_rank 512)"]),
        ("gpt_oss", ["attention sinks", "experts"]),
        ("qwen3_next", ["linear attention", "layers of the kind linear_attention"]),
        ("gemma3", ["several modalities (text_config)"]),
        ("t5", ["an encoder"]),
        ("phi", ["norms that subtract a mean (layer_norm_eps"]),
        ("gpt_neox", ["norms that subtract a mean", "attention and FFN side by side"]),
        ("starcoder2", ["norms that subtract a mean (norm_epsilon"]),
        ("falcon", ["norms that subtract a mean", "side by side (parallel_attn"]),
        ("cohere", ["rotation of neighbours"]),
        ("olmo2", ["norms behind the halves and none before"]),
        ("lfm2", ["convolutions (conv_L_cache 3)"]),
    ],
)
def test_what_a_family_has_that_no_fact_holds_is_named(kind: str, named: list[str]) -> None:
    with pytest.raises(InputError, match=f"model_type {kind!r} is not a family") as caught:
        DecoderFacts.from_config(_config(kind))
    for words in named:
        assert words in str(caught.value)
    assert "known families: llama, mistral" in str(caught.value)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_families_that_are_known_have_nothing_of_that(
    tiny: Callable[[str], Path], family: str
) -> None:
    config = Student(tiny(family)).config
    assert config["model_type"] in FAMILIES
    assert missing_facts(config) == []


@pytest.mark.parametrize(
    "config", [{}, {"model_type": None}, {"model_type": ["llama"]}, {"layer_types": 3}], ids=str
)
def test_a_config_of_no_family_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is not a family that edgedistill knows"):
        DecoderFacts.from_config(config)


def test_a_recipe_is_told_before_any_work(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny("llama"), tmp_path / "student"))
    write_json(student / "config.json", _config("deepseek_v3"))
    with pytest.raises(RecipeError, match=r"student: .*'deepseek_v3' is not a family .* latent"):
        load_recipe(write_recipe(tmp_path, student))
