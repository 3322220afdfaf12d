"""Facts beyond plain blocks in an ONNX graph, held against transformers; a wrong fact shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.exporters.onnx import Onnx
from edgedistill.rope import Rope
from edgedistill.session import Logits
from edgedistill.student import Student
from edgedistill.verify.lint import lint_artifact
from tests.test_onnx import CONTEXT_TOKENS, export
from tests.test_onnx_runtime import IDS, divergence, judge, open_session
from tests.tiny import write_student

Tiny = Callable[[str], Path]
# Nats at the worst position: an exact graph is at 1e-12.
SEEN = 1e-3


class OtherFacts(Student):
    """A student whose config states other facts than its graph is to be written from."""

    def __init__(self, path: Path, **changes: Any) -> None:
        super().__init__(path)
        self._changes = changes

    @property
    def facts(self) -> DecoderFacts:
        return replace(super().facts, **self._changes)


def export_with(student: Path, dst: Path, **changes: Any) -> Path:
    dst.mkdir()
    Onnx().export(OtherFacts(student, **changes), dst, context_tokens=CONTEXT_TOKENS)
    return dst


def streamed(artifact: Path) -> Logits:
    with open_session(artifact) as session:
        return np.concatenate(list(session.stream_logits(IDS)))


def nodes(artifact: Path) -> list[Any]:
    return list(onnx.load(artifact / "model.onnx", load_external_data=False).graph.node)


FACTS: dict[str, list[dict[str, Any]]] = {
    "gemma3": [
        {"window_tokens": 15},
        {"window_tokens": 17},
        {"sliding_layers": (False, True, True)},
        {"sliding_rope": Rope(10000.0)},
        {"rope": Rope(500.0)},
        {"norm_offset": 0.0},
        {"scaled_embedding": False},
        {"activation": "silu"},
        {"rotated_dims": 16},
    ],
    "gemma2": [
        {"window_tokens": 17},
        {"attention_scale": 0.25},
        {"attention_softcap": None},
        {"logits_softcap": None},
    ],
    "smollm3": [{"unrotated_layers": ()}, {"unrotated_layers": (True,) * 8}],
    "granite": [
        {"attention_scale": None},
        {"embedding_multiplier": 1.0},
        {"residual_multiplier": 1.0},
        {"logits_divisor": 1.0},
    ],
    "qwen2_yarn": [{"rope": Rope(10000.0)}],
    "mistral_sliding": [{"window_tokens": 15}, {"window_tokens": None}],
    "qwen3_sliding": [{"sliding_layers": (True, True, True)}],
}


@pytest.mark.parametrize(
    ("family", "changes"), [(f, c) for f, all_ in FACTS.items() for c in all_], ids=str
)
def test_a_wrong_fact_shows(
    tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    wrong = streamed(export_with(tiny(family), tmp_path / "o", **changes))
    assert divergence(judge(tiny(family)), wrong) > SEEN


def test_the_factor_of_a_scaled_rotation_is_in_the_tables(tiny: Tiny, tmp_path: Path) -> None:
    rope = Student(tiny("qwen2_yarn")).facts.rope
    assert rope.attention_factor > 1.0
    wrong = {"rope": replace(rope, attention_factor=1.0)}
    artifact = export_with(tiny("qwen2_yarn"), tmp_path / "o", **wrong)
    assert divergence(judge(tiny("qwen2_yarn")), streamed(artifact)) > SEEN


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("gemma3", {"scaled_embedding": False}, "embedding scale"),
        ("gemma3", {"window_tokens": 17}, "sliding window"),
        ("gemma3", {"sliding_rope": None}, "RoPE theta of sliding layers"),
        ("gemma2", {"attention_scale": 0.25}, "attention scale"),
        ("gemma2", {"attention_softcap": 50.0}, "soft cap of attention"),
        ("gemma2", {"logits_softcap": None}, "soft cap of logits"),
        ("granite", {"attention_scale": None}, "attention scale"),
        ("granite", {"embedding_multiplier": 1.0}, "embedding scale"),
        ("granite", {"residual_multiplier": 0.5}, "residual scale"),
        ("granite", {"logits_divisor": 0.5}, "divisor of logits"),
        ("llama", {"logits_softcap": 30.0}, "soft cap of logits"),
        ("llama", {"residual_multiplier": 0.5}, "residual scale"),
        ("smollm3", {"unrotated_layers": ()}, "layers without rotation"),
        ("mistral", {"sliding_layers": (True,) * 3, "window_tokens": 16}, "sliding window"),
    ],
    ids=str,
)
def test_lint_names_a_wrong_fact(
    tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any], name: str
) -> None:
    artifact = export_with(tiny(family), tmp_path / "o", **changes)
    checks = lint_artifact(artifact, "onnx", tiny(family), context_tokens=CONTEXT_TOKENS)
    failed = {check.name for check in checks if not check.passed}
    beside = {"lint: sliding layers", "lint: RoPE theta of sliding layers"}
    assert f"lint: {name}" in failed
    assert failed <= {f"lint: {name}"} | (beside if name == "sliding window" else set())


# As in Phi-4-mini, in the multiples of 16 that the operator takes: 48 of 64 dimensions.
PARTLY_ROTATED: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": np.linspace(1.0, 2.0, 24).tolist(),
        "long_factor": np.linspace(1.5, 9.0, 24).tolist(),
    },
}


def test_heads_are_rotated_in_part_and_by_short_factors(tmp_path: Path) -> None:
    student = write_student(tmp_path / "s", "phi4_mini", **PARTLY_ROTATED)
    facts = Student(student).facts
    assert facts.rotary_dim == 48
    expected = judge(student)
    artifact = export(student, tmp_path / "o")
    assert divergence(expected, streamed(artifact)) <= 1e-8
    checks = lint_artifact(artifact, "onnx", student, context_tokens=CONTEXT_TOKENS)
    assert [check for check in checks if not check.passed] == []
    wrong_facts: dict[str, dict[str, Any]] = {
        "all": {"rotated_dims": None, "rope": Rope(10000.0)},
        "unscaled": {"rope": Rope(10000.0)},
        "small": {"rope": replace(facts.rope, attention_factor=1.0)},
    }
    for name, changes in wrong_facts.items():
        wrong = export_with(student, tmp_path / name, **changes)
        assert divergence(expected, streamed(wrong)) > SEEN


def test_a_context_that_needs_long_factors_is_refused(tmp_path: Path) -> None:
    student = write_student(tmp_path / "s", "phi4_mini", **PARTLY_ROTATED)
    with pytest.raises(InputError, match=r"257 is more than the 256 tokens that LongRoPE's"):
        Onnx().export(Student(student), tmp_path, context_tokens=257)


def test_layers_share_a_table_for_each_base(tiny: Tiny, tmp_path: Path) -> None:
    read = [
        tuple(node.input[7:9])
        for node in nodes(export(tiny("gemma3"), tmp_path / "o"))
        if node.op_type == "GroupQueryAttention"
    ]
    sliding = ("rope.sliding.cos", "rope.sliding.sin")
    assert read == [sliding, ("rope.cos", "rope.sin"), sliding]


def test_a_block_costs_as_many_nodes_as_it_has_operations(tiny: Tiny, tmp_path: Path) -> None:
    """The norm after an addition is one node with it, also where another norm stands before."""
    counts = {
        family: [node.op_type for node in nodes(export(tiny(family), tmp_path / family))]
        for family in ("llama", "gemma3")
    }
    fused = [kinds.count("SkipSimplifiedLayerNormalization") for kinds in counts.values()]
    assert fused == [2 * 3, 2 * 3]
    # Seven matrices, attention, two fused norms, silu in two, the product of gate and up; Gemma:
    # gelu in one, two norms behind the halves, and each of q and k normalized in three.
    ends = 1 + 1 + 1 + 6 + 2  # embedding, first norm, head, lengths, two slices
    assert len(counts["llama"]) == 3 * 13 + ends
    assert len(counts["gemma3"]) == 3 * (12 + 2 + 6) + ends + 1  # the embedding is multiplied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "heads of 24 dimensions: .* takes multiples of 16"),
        ({"rotated_dims": 8}, "heads that rotate 8 dimensions: .* takes multiples of 16"),
        ({"head_dim": 24, "unrotated_layers": (True, True, True)}, None),
        ({"head_dim": 20, "unrotated_layers": (True, True, True)}, "20 .* multiples of 8"),
    ],
)
def test_heads_that_the_operator_does_not_take_are_refused(
    tiny: Tiny, changes: dict[str, Any], message: str | None
) -> None:
    import re

    found = Onnx().problems(replace(Student(tiny("llama")).facts, **changes))
    assert (len(found) == 1 and re.search(message, found[0])) if message else found == []
