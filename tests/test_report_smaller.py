"""What the report says of pruning and healing."""

from __future__ import annotations

from typing import Literal

import pytest

from edgedistill.allocation_results import AllocatedMatrix, Allocation, StepUp
from edgedistill.healing_results import Healing, HealingPoint, Recovery
from edgedistill.pruning_results import (
    DomainFertility,
    DomainLoss,
    DroppedSet,
    PrunedVocabulary,
    Pruning,
    TriedBlock,
)
from edgedistill.report.markdown import render_markdown
from edgedistill.report.page import render_page
from edgedistill.report.smaller import allocation_rows, pruning_sentences, rung_sentences, speed_ups
from edgedistill.results import BuildReport
from edgedistill.rung_results import RungReport
from tests.built_report import build_report

PRUNING = Pruning(
    stage="prune_depth",
    parameters_before=134_515_008,
    parameters_after=120_353_472,
    before={"num_hidden_layers": 30, "hidden_size": 576},
    after={"num_hidden_layers": 26, "hidden_size": 576},
    losses=[
        DomainLoss(domain="calibration", tokens=1024, kl=0.592),
        DomainLoss(domain="second", tokens=1024, kl=1.104),
    ],
    second_loses_more=True,
    dropped_layers=[12, 13, 14, 25],
    sets=[
        DroppedSet(chosen_by="search", blocks=[12, 13, 14, 25], kl=0.541),
        DroppedSet(chosen_by="block influence", blocks=[13, 14, 25, 26], kl=0.567),
    ],
    tried=[TriedBlock(dropped=[12], block=25, influence=0.022, kl=0.143)],
)
HEALING = Healing(
    trained="lora",
    parameters_trained=4_884_480,
    held_out_tokens=4096,
    kl_before=0.597,
    kl_after=0.213,
    kept_step=20,
    stopped_early=True,
    curve=[
        HealingPoint(step=0, tokens=0, learning_rate=0.0, loss=None, held_out_kl=0.597),
        HealingPoint(step=20, tokens=40_960, learning_rate=1e-3, loss=0.31, held_out_kl=0.213),
        HealingPoint(step=40, tokens=81_920, learning_rate=1e-4, loss=0.28, held_out_kl=0.221),
    ],
)


MATRICES = [
    AllocatedMatrix(
        tensor=name,
        grid=f"int{bits} group 32 (fixed zero)",
        bits=bits,
        stored_bytes=bits * 45_056,
        loss=0.031 / bits,
        basis="predicted",
        step_up=StepUp(
            grid="int8 group 32 (fixed zero)", more_bytes=9, gain=0.0071, gain_per_byte=8e-4
        ),
    )
    for name, bits in (
        ("model.embed_tokens.weight", 8),
        ("model.layers.0.self_attn.q_proj.weight", 2),
        ("model.layers.0.mlp.down_proj.weight", 4),
        ("model.layers.10.self_attn.q_proj.weight", 4),
        ("model.layers.10.mlp.down_proj.weight", 8),
    )
]
ALLOCATION = Allocation(
    formats=["gguf", "onnx"],
    target_bytes=60_500_000,
    total_bytes=60_412_928,
    weights=134_515_008,
    bits_per_weight=3.593,
    loss=0.191,
    matrices=MATRICES,
)


@pytest.fixture
def report() -> BuildReport:
    rung = RungReport(rung="int4", prunings=[PRUNING], healings=[HEALING], allocations=[ALLOCATION])
    return build_report().model_copy(update={"rungs": [rung]})


def test_what_went_and_what_it_cost_is_said_everywhere(report: BuildReport) -> None:
    page, markdown = render_page(report), render_markdown(report)
    said = "\n".join(rung_sentences(report, report.rungs[0]))
    for words in ("10.5% went", "num_hidden_layers 30 to 26", "12, 13, 14, 25", "0.592", "1.1"):
        assert words in said
    assert "hidden_size" not in said  # it stayed
    for text in (page, markdown):
        assert "second domain loses much more" in text
        assert "from 0.597 to 0.213" in text
    assert "0.143" in page  # every candidate of the search


def test_the_speed_up_is_what_was_measured_against_the_unpruned_rung(report: BuildReport) -> None:
    found = {s.format: s for s in speed_ups(report, report.rungs[0])}
    artifacts = {(a.rung, a.format): a for a in report.artifacts}
    pruned, whole = artifacts["int4", "gguf"].bench, artifacts["int8", "gguf"].bench
    assert pruned is not None
    assert whole is not None
    first = min(pruned.decode_tok_per_s)
    expected = pruned.decode_tok_per_s[first].p50 / whole.decode_tok_per_s[first].p50
    assert found["gguf"].over == "int8"  # nearer in bits than float
    assert found["gguf"].ratio == pytest.approx(expected)
    assert "coreml" not in found  # it was not timed


def test_the_curve_marks_the_weights_that_were_kept(report: BuildReport) -> None:
    page = render_page(report)
    picture = page[page.index("Held-out KL over tokens") :]
    picture = picture[: picture.index("</svg>")]
    assert picture.count("<circle") == 2
    assert picture.index("40,960 tokens: 0.213") < picture.index("81,920 tokens")
    assert picture.count("<polygon") == 1


def test_a_build_without_pruning_says_nothing_of_it() -> None:
    assert "made smaller?" not in render_page(build_report())


def test_who_got_which_bits_is_shown_block_by_block(report: BuildReport) -> None:
    rows = {
        r.name: [m.bits if m else None for m in r.matrices] for r in allocation_rows(ALLOCATION)
    }
    assert rows == {
        "self_attn.q_proj": [2, 4],
        "mlp.down_proj": [4, 8],
        "model.embed_tokens.weight": [8],
    }
    page = render_page(report)
    said = "\n".join(rung_sentences(report, report.rungs[0]))
    assert "3.59 bits per weight, 60.4 of 60.5 MB" in said
    assert "2 on 4 bits" in said
    assert page.count('class="bits-4"') == 2
    assert "would give 0.0071 back for 9 bytes" in page


def test_a_recovery_says_how_many_codes_are_others(report: BuildReport) -> None:
    fields = HEALING.model_dump() | {"trained": "adapter", "sequences": 80}
    recovery = Recovery(**fields, codes=1000, codes_changed=23)
    rung = RungReport(rung="int4", recoveries=[recovery])
    report = report.model_copy(update={"rungs": [rung]})
    (said,) = rung_sentences(report, rung)
    assert said.startswith("Recovery (adapter")
    assert "from 0.597 to 0.213" in said
    assert "2.3% of the codes are others" in said
    assert "Held-out KL over tokens" in render_page(report)


def test_a_pruned_vocabulary_says_how_much_longer_texts_became() -> None:
    domains: tuple[tuple[Literal["calibration", "second"], int], ...] = (
        ("calibration", 202),
        ("second", 296),
    )
    fertility = [
        DomainFertility(
            domain=domain,
            characters=1000,
            tokens_before=200,
            tokens_after=after,
            per_character_before=0.2,
            per_character_after=after / 1000,
        )
        for domain, after in domains
    ]
    vocabulary = PrunedVocabulary(
        used=9876, merged_from=543, others=21, split=9214, fertility=fertility, proven_on=18_348
    )
    pruning = PRUNING.model_copy(
        update={"stage": "prune_vocabulary", "losses": [], "vocabulary": vocabulary}
    )
    said = "\n".join(pruning_sentences(pruning))
    assert "9,214 rarer ones are written in pieces" in said
    assert "calibration domain take 1.0% more" in said
    assert "second domain take 48.0% more" in said
    assert "Warning" in said
