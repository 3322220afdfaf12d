"""The facts of a family, and the decoder that runs from them, against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from edgedistill.decoder import DecoderFacts
from edgedistill.decoder_forward import DecoderForward, Past
from edgedistill.errors import InputError
from edgedistill.rope import Rope
from edgedistill.student import Student
from tests.tiny import FAMILY_CONFIGS, write_student


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_decoder_equals_transformers_past_the_original_context(
    tiny: Callable[[str], Path], family: str
) -> None:
    from transformers import AutoModelForCausalLM

    student = Student(tiny(family))
    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(ids).logits
        logits = DecoderForward(student).logits(ids)
    assert expected.std() > 1.0
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "neutral"),
    [
        ("mistral_sliding", {"sliding_layers": ()}),
        ("mistral_sliding", {"window_tokens": 17}),
        ("qwen2_yarn", {"rope": Rope(10000.0)}),
        ("qwen3_sliding", {"sliding_layers": (True,) * 3}),
        ("smollm3", {"unrotated_layers": ()}),
        ("smollm3", {"unrotated_layers": (True, False, False, True)}),
        ("granite", {"attention_scale": None}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_divisor": 1.0}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logits_softcap": None}),
        ("gemma2", {"sliding_layers": (False, True, False)}),
    ],
    ids=str,
)
def test_a_fact_that_is_left_out_shows(
    tiny: Callable[[str], Path], family: str, neutral: dict[str, Any]
) -> None:
    """Or the students would be too dull to hold the decoder to their facts."""

    class Told(Student):
        facts = dataclasses.replace(Student(tiny(family)).facts, **neutral)

    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = DecoderForward(Student(tiny(family))).logits(ids)
        without = DecoderForward(Told(tiny(family))).logits(ids)
    apart = functional.kl_div(
        without.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert apart / ids.numel() > 0.02  # nats a token


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("smollm3", {"no_rope_layers": [0, 1, 0, 1, 1]}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
        ("smollm3", {"attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("granite", {"attention_bias": True}),
        ("gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3", {"final_logit_softcapping": 8.0}),
    ],
    ids=str,
)
def test_variants_of_a_family_equal_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    student = Student(write_student(tmp_path / "student", family, **changes))
    ids = torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits, expected = DecoderForward(student).logits(ids), model(ids).logits
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_tokens_behind_others_equal_transformers(tiny: Callable[[str], Path], family: str) -> None:
    """In pieces of which each sees what went through before: many, one, several, one."""
    from transformers import AutoModelForCausalLM

    student = Student(tiny(family))
    ids = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32).eval()
    decoder = DecoderForward(student)
    blocks = [
        (decoder.read_block(layer), Past(student.facts, 2, 100))
        for layer in range(student.facts.layers)
    ]
    found = []
    with torch.inference_mode():
        expected = model(ids).logits
        for piece in torch.split(ids, [80, 1, 18, 1], dim=1):
            hidden = decoder.embed(piece)
            for weights, past in blocks:
                hidden = decoder.through(weights, hidden, past=past)
            found.append(decoder.head(hidden))
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_facts_name_every_tensor_of_a_checkpoint(tiny: Callable[[str], Path], family: str) -> None:
    student = Student(tiny(family))
    shapes = student.facts.tensor_shapes()
    assert shapes == {name: student.shape(name) for name in shapes}
    assert set(shapes) == set(student.names())


def test_rope_of_transformers_4_and_5_is_the_same_fact(tiny: Callable[[str], Path]) -> None:
    config = Student(tiny("llama3")).config
    parameters = dict(config["rope_parameters"])
    older = {k: v for k, v in config.items() if k != "rope_parameters"}
    older |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    new, old = (DecoderFacts.from_config(c).rope.inverse_frequencies(32) for c in (config, older))
    assert (new == old).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "relu"}, "relu"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ({"num_hidden_layers": None}, "wrong kind"),
    ],
)
def test_what_the_facts_do_not_cover_is_refused_by_name(
    tiny: Callable[[str], Path], change: dict[str, Any], named: str
) -> None:
    config = Student(tiny("llama")).config | change
    with pytest.raises(InputError, match=named):
        DecoderFacts.from_config(config)


def test_a_missing_key_is_named(tiny: Callable[[str], Path]) -> None:
    config = dict(Student(tiny("llama")).config)
    del config["rms_norm_eps"]
    with pytest.raises(InputError, match="rms_norm_eps"):
        DecoderFacts.from_config(config)


def _facts(student: Path, **changes: Any) -> DecoderFacts:
    config = Student(student).config | changes
    return DecoderFacts.from_config({k: v for k, v in config.items() if v != "absent"})


def test_layers_without_rotation_are_those_of_transformers(tiny: Callable[[str], Path]) -> None:
    """In transformers ``no_rope_layers`` has 1 where a layer uses its RoPE."""
    student = tiny("smollm3")
    assert Student(student).config["no_rope_layers"] == [1, 1, 1, 0]
    assert _facts(student).unrotated_layers == (False, False, False, True)
    listed = _facts(student, no_rope_layers=[0, 1, 0, 1, 0])
    assert listed.unrotated_layers == (True, False, True, False)
    every_fourth = _facts(
        student, no_rope_layers=None, no_rope_layer_interval=None, num_hidden_layers=8,
        layer_types=None,
    )  # fmt: skip
    assert [every_fourth.rope_of(i) is None for i in range(8)] == [False] * 3 + [True] + [
        False
    ] * 3 + [True]
    # Its windows are where it is not rotated, and its base is one of its own.
    slides = _facts(student, use_sliding_window=True, sliding_window=16, layer_types=None)
    assert slides.sliding_layers == (False, False, False, True)
    assert slides.rope_of(3) is None
    assert slides.window_of(3) == 16
    assert _facts(student, rope_parameters=None).rope == Rope(2e6)


def test_windows_of_a_config_that_does_not_list_its_layers(tiny: Callable[[str], Path]) -> None:
    qwen = tiny("qwen3_sliding")
    assert _facts(qwen, layer_types="absent").sliding_layers == (False, True, True)
    assert _facts(qwen, layer_types="absent", max_window_layers="absent").sliding_layers == ()
    off = _facts(qwen, layer_types="absent", use_sliding_window="absent")
    assert off.window_tokens is None
    assert _facts(tiny("gemma2"), layer_types="absent").sliding_layers == (True, False, True)
    mistral = _facts(tiny("mistral"), sliding_window="absent")
    assert mistral.window_of(2) == 4096
    assert mistral.rope_of(2) == mistral.rope


def test_numbers_of_a_config_that_leaves_them_out_are_those_of_transformers(
    tiny: Callable[[str], Path],
) -> None:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    gemma = _facts(tiny("gemma2"), **dict.fromkeys(caps, "absent"))
    assert (gemma.attention_softcap, gemma.logits_softcap) == (50.0, 30.0)
    gemma = _facts(tiny("gemma2"), **dict.fromkeys(caps))
    assert (gemma.attention_softcap, gemma.logits_softcap) == (None, None)
    keys = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    granite = _facts(tiny("granite"), **dict.fromkeys(keys, "absent"))
    assert granite.attention_scale == granite.embedding_scale == granite.logits_divisor == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 1.5},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"factor": 1.0},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    changed = AutoConfig.for_model(
        "qwen2",
        hidden_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters=parameters | changes,
    )
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](changed)
    rope = DecoderFacts.from_config(changed.to_dict()).rope
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    found = torch.from_numpy(rope.inverse_frequencies(128))
    torch.testing.assert_close(found, inverse, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3_sliding", {"layer_types": None, "max_window_layers": None}, "max_window_layers"),
        ("mistral_sliding", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("granite", {"sliding_window": 16}, "sliding_window 16"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ("gemma2", {"attention_bias": True}, "attention_bias"),
        ("qwen2_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor"),
    ],
)
def test_what_a_config_contradicts_is_refused_by_name(
    tiny: Callable[[str], Path], family: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        _facts(tiny(family), **change)


def test_gemmas_config_of_transformers_4_and_5_is_the_same_fact(
    tiny: Callable[[str], Path],
) -> None:
    config = Student(tiny("gemma3")).config
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types")}
    older |= {"rope_theta": 10000.0, "rope_local_base_freq": 500.0, "sliding_window_pattern": 2}
    assert DecoderFacts.from_config(older) == DecoderFacts.from_config(config)
    # What a config may leave out, transformers fills in; every sixth layer attends to all.
    bare = {k: v for k, v in older.items() if not k.startswith(("rope_", "sliding_window_p"))}
    facts = DecoderFacts.from_config(bare | {"num_hidden_layers": 7})
    assert facts.sliding_layers == (True,) * 5 + (False, True)
    assert facts.rope_of(5) == Rope(1e6)
    assert facts.rope_of(6) == Rope(1e4)
    assert facts.window_of(5) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"rope_parameters": ["full"]}, "wrong kind"),
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
    ],
)
def test_what_the_facts_of_gemma_do_not_cover_is_refused_by_name(
    tiny: Callable[[str], Path], change: dict[str, Any], named: str
) -> None:
    config = Student(tiny("gemma3")).config | change
    with pytest.raises(InputError, match=named):
        DecoderFacts.from_config(config)
