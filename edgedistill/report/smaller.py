"""How each rung was made smaller: what was taken out, how it healed, which bits went where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgedistill.allocation_results import AllocatedMatrix, Allocation
from edgedistill.healing_results import Healing, Recovery, Training
from edgedistill.pruning_results import PrunedVocabulary, Pruning
from edgedistill.report import words
from edgedistill.report.svg import Canvas, Scale, nice_ticks
from edgedistill.results import ArtifactReport, BuildReport
from edgedistill.rung_results import RungReport

# The number of a block in a tensor's name.
_BLOCK = re.compile(r"\.(\d+)\.")
WIDTH, HEIGHT = 430.0, 240.0
LEFT, TOP, RIGHT, BOTTOM = 52.0, 48.0, WIDTH - 24.0, HEIGHT - 46.0


@dataclass(frozen=True)
class SpeedUp:
    """Decode rate of a pruned artifact over that of an unpruned one of the same build."""

    format: str
    over: str
    ratio: float
    trusted: bool

    def __str__(self) -> str:
        """A sentence; the two were measured one after the other, not in turns."""
        said = f"{self.format}: {self.ratio:.2f} times the decode rate of {self.over}"
        return said if self.trusted else f"{said} (not to be trusted: a run was rejected)"


def speed_ups(report: BuildReport, rung: RungReport) -> list[SpeedUp]:
    """Measured, in each format, against the unpruned rung of the most similar bits per weight."""
    if not rung.prunings:
        return []
    pruned = {other.rung for other in report.rungs if other.prunings}
    whole = [a for a in report.artifacts if a.rung not in pruned and a.bench is not None]
    own = [a for a in report.artifacts if a.rung == rung.rung and a.bench is not None]
    found = []
    for artifact in own:
        alike = [other for other in whole if other.format == artifact.format]
        if alike:
            nearest = min(
                alike, key=lambda other: abs(other.bits_per_weight - artifact.bits_per_weight)
            )
            found.append(_speed_up(artifact, nearest))
    return found


def _speed_up(artifact: ArtifactReport, over: ArtifactReport) -> SpeedUp:
    bench, other = artifact.bench, over.bench
    assert bench is not None
    assert other is not None
    shortest = min(bench.decode_tok_per_s)
    ratio = bench.decode_tok_per_s[shortest].p50 / other.decode_tok_per_s[shortest].p50
    return SpeedUp(artifact.format, over.rung, ratio, bench.accepted and other.accepted)


def pruning_sentences(pruning: Pruning) -> Iterator[str]:
    """What was taken out, why that, and what it cost before any healing."""
    share = 1 - pruning.parameters_after / pruning.parameters_before
    yield (
        f"{pruning.stage} left {pruning.parameters_after:,} of {pruning.parameters_before:,} "
        f"parameters ({words.percent(share)} went): {_sizes(pruning)}."
    )
    if pruning.dropped_layers:
        blocks = ", ".join(map(str, pruning.dropped_layers))
        others = "; ".join(f"{s.chosen_by} {words.number(s.kl)}" for s in pruning.sets)
        yield f"Blocks {blocks} went. KL of the sets that each way would drop: {others}."
    for kept in pruning.kept:
        yield (
            f"{kept.what}: {words.percent(kept.mean)} of the importance stayed, "
            f"{words.percent(kept.least)} in the layer that lost most."
        )
    for loss in pruning.losses:
        yield (
            f"That cost a mean KL of {words.number(loss.kl)} nats on {loss.tokens:,} held-out "
            f"tokens of the {loss.domain} text."
        )
    if pruning.vocabulary is not None:
        yield from vocabulary_sentences(pruning.vocabulary)
    if pruning.second_loses_more:
        yield (
            "Warning: the second domain loses much more than the one that the choice was made on. "
            "Calibrate on both."
        )


def vocabulary_sentences(vocabulary: PrunedVocabulary) -> Iterator[str]:
    """What a pruned vocabulary holds, and how much longer texts became by it."""
    yield (
        f"{vocabulary.used:,} tokens that the texts use stayed, {vocabulary.merged_from:,} that "
        f"those are merged from, {vocabulary.others:,} others; {vocabulary.split:,} rarer ones are "
        f"written in pieces now. The new tokenizer was held against the whole one on "
        f"{vocabulary.proven_on:,} texts."
    )
    for text in vocabulary.fertility:
        longer = text.tokens_after / text.tokens_before - 1
        yield f"Texts of the {text.domain} domain take {words.percent(longer)} more tokens."


def healing_sentence(healing: Healing) -> str:
    """What was trained, and what came of it."""
    return f"Healing ({healing.trained}, {_training(healing)}"


def recovery_sentence(recovery: Recovery) -> str:
    """What was trained on the grids, and what came of it."""
    changed = recovery.codes_changed / max(1, recovery.codes)
    moved = f" {words.percent(changed)} of the codes are others now." if changed else ""
    return f"Recovery ({recovery.trained}, {_training(recovery)}{moved}"


def _training(healing: Training) -> str:
    tokens = healing.curve[-1].tokens
    ended = "; it had ceased to fall before the budget was spent" if healing.stopped_early else ""
    return (
        f"{healing.parameters_trained:,} numbers, {tokens:,} tokens) "
        f"took the held-out KL from {words.number(healing.kl_before)} to "
        f"{words.number(healing.kl_after)} nats{ended}."
    )


def allocation_sentence(allocation: Allocation) -> str:
    """How the bytes of a target were given out."""
    widths = sorted({matrix.bits for matrix in allocation.matrices})
    shares = []
    for bits in widths:
        of_width = [matrix for matrix in allocation.matrices if matrix.bits == bits]
        taken = sum(matrix.stored_bytes for matrix in of_width)
        shares.append(f"{len(of_width)} on {bits} bits ({words.megabytes(taken)} MB)")
    return (
        f"Mixed bits: {allocation.bits_per_weight:.2f} bits per weight, "
        f"{words.megabytes(allocation.total_bytes)} of {words.megabytes(allocation.target_bytes)} "
        f"MB in the fullest of {', '.join(allocation.formats)}; of {len(allocation.matrices)} "
        f"matrices {', '.join(shares)}."
    )


@dataclass(frozen=True)
class AllocationRow:
    """The same matrix in every block; None where a block has none, or it is in no block."""

    name: str
    matrices: tuple[AllocatedMatrix | None, ...]


def allocation_rows(allocation: Allocation) -> list[AllocationRow]:
    """A row for each kind of matrix, a column for each block; embedding and head by themselves."""
    places = [_BLOCK.search(matrix.tensor) for matrix in allocation.matrices]
    blocks = sorted({int(place[1]) for place in places if place})
    rows: dict[str, dict[int, AllocatedMatrix]] = {}
    alone = []
    for matrix, place in zip(allocation.matrices, places, strict=True):
        if place is None:
            alone.append(AllocationRow(matrix.tensor, (matrix,)))
        else:
            kind = matrix.tensor[place.end() :].removesuffix(".weight")
            rows.setdefault(kind, {})[int(place[1])] = matrix
    in_blocks = [
        AllocationRow(kind, tuple(of_kind.get(block) for block in blocks))
        for kind, of_kind in rows.items()
    ]
    return in_blocks + alone


def rung_sentences(report: BuildReport, rung: RungReport) -> list[str]:
    """Everything that is said of a rung, in the order in which it was done."""
    sentences = [line for pruning in rung.prunings for line in pruning_sentences(pruning)]
    sentences += [healing_sentence(healing) for healing in rung.healings]
    sentences += [allocation_sentence(allocation) for allocation in rung.allocations]
    sentences += [recovery_sentence(recovery) for recovery in rung.recoveries]
    measured = [str(speed_up) for speed_up in speed_ups(report, rung)]
    return [*sentences, f"Measured: {'; '.join(measured)}."] if measured else sentences


def healing_picture(healing: Training) -> str:
    """The held-out KL over the tokens that were trained on; the point that was kept is marked."""
    canvas = Canvas(WIDTH, HEIGHT, "Held-out KL over tokens")
    points = healing.curve
    across = nice_ticks(0.0, float(points[-1].tokens), 4)
    up = nice_ticks(0.0, max(point.held_out_kl for point in points), 4)
    x, y = Scale(0.0, across[-1], LEFT, RIGHT), Scale(0.0, up[-1], BOTTOM, TOP)
    _axes(canvas, x, y, across, up)
    places = [(x(point.tokens), y(point.held_out_kl)) for point in points]
    for (x1, y1), (x2, y2) in pairwise(places):
        canvas.line(x1, y1, x2, y2, "span")
    for point, (left, top) in zip(points, places, strict=True):
        kept = point.step == healing.kept_step
        tip = f"{point.tokens:,} tokens: {words.number(point.held_out_kl)} nats"
        shape, size = ("diamond", 7) if kept else ("circle", 4)
        canvas.mark(left, top, shape, "mark filled rung-0", tip, size)
    canvas.text(LEFT, 14, "diamond: the weights that were kept", "tick")
    return canvas.render("picture small")


def _axes(canvas: Canvas, x: Scale, y: Scale, across: Sequence[float], up: Sequence[float]) -> None:
    for tick in across:
        canvas.line(x(tick), TOP, x(tick), BOTTOM, "grid")
        canvas.text(x(tick), BOTTOM + 16, f"{tick:,.0f}", "tick", "middle")
    for tick in up:
        canvas.line(LEFT, y(tick), RIGHT, y(tick), "grid")
        canvas.text(LEFT - 6, y(tick) + 4, words.number(tick), "tick", "end")
    canvas.text(RIGHT, BOTTOM + 36, "tokens trained on", "axis-title", "end")
    canvas.text(LEFT - 6, TOP - 12, "KL", "axis-title", "end")


def _sizes(pruning: Pruning) -> str:
    """Only what changed, by the names of the config."""
    changed = (
        f"{name} {pruning.before[name]:,} to {size:,}"
        for name, size in pruning.after.items()
        if pruning.before.get(name) != size
    )
    return ", ".join(changed)
