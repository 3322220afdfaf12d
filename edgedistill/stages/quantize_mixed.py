"""Mixed bits to a target: 2 to 8 bits where they lose least, then GPTQ on the chosen grids.

docs/compression.md has the method and its figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, field_validator, model_validator

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.decoder import DecoderFacts
from edgedistill.errors import UsageError
from edgedistill.gptq_cost import gptq_cost
from edgedistill.mixed_bytes import MixedBytes
from edgedistill.plugins import plugin_module, plugin_names
from edgedistill.quantized import Grid
from edgedistill.stage import Stage, StageCost
from edgedistill.student import Student

if TYPE_CHECKING:
    from edgedistill.calibration import Ids
    from edgedistill.grid_damage import SensitivityText

# Of the calibration text: what the errors are measured on, and what GPTQ sees for it.
MEASURED_TOKENS, FITTED_TOKENS = 2048, 8192
# Forward passes, or their like, of a token that is measured on (forward, backward, the walk; one
# more for each grid of the embedding), and of one that is fitted to (for the head, read, it leaves)
PASSES_MEASURED, PASSES_FITTED = 4, 3


class QuantizeMixed(Stage):
    """Distribute 2, 3, 4, 5 and 8 bits over all matrices, embedding and head among them.

    Attributes:
        bits_per_weight: the target: bits of all tensors over the number of parameters (a tied
            matrix counted once), in the fullest of the formats.
        size_mb: or else the bytes of all tensors, in 10^6, in the fullest of the formats;
            tokenizer and metadata come on top.
        formats: that the grids have to be held by, and whose bytes count; default: those that the
            recipe exports the rung to.
        calibration: the text that it runs the student on; default: the recipe's.
        chat: the fixed part of the conversations that the text is put into; default: the recipe's.
    """

    bits_per_weight: Annotated[float, Field(gt=0.0, le=32.0)] | None = None
    size_mb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    formats: tuple[str, ...] | None = None
    calibration: Calibration = Calibration()
    chat: Chat = Chat()

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in formats or ():
            try:
                plugin_module("exporters", name)
            except UsageError as error:
                raise ValueError(str(error.message)) from error
        return formats

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.bits_per_weight is None) == (self.size_mb is None):
            raise ValueError("give either bits_per_weight or size_mb")
        return self

    @property
    def formats_read(self) -> tuple[str, ...]:
        """The formats whose bytes count."""
        return self.formats or plugin_names("exporters")

    def target_bytes(self, facts: DecoderFacts) -> int:
        """That all tensors together may take."""
        if self.size_mb is not None:
            return int(self.size_mb * 1e6)
        assert self.bits_per_weight is not None  # one of them is given
        return int(self.bits_per_weight * facts.parameters / 8)

    def grids(self, facts: DecoderFacts) -> list[Grid]:
        """All that a matrix could be put on."""
        candidates = MixedBytes(facts, self.formats).candidates.values()
        return list(dict.fromkeys(grid for grids in candidates for grid in grids))

    def expected_grids(self, name: str, facts: DecoderFacts) -> dict[Grid, float]:
        """The mixture that meets the target, the same for every matrix."""
        return MixedBytes(facts, self.formats).expected(name, self.target_bytes(facts))

    def cost(self, facts: DecoderFacts) -> StageCost:
        """The sensitivity of every matrix, then GPTQ."""
        gptq = gptq_cost(facts, self.calibration.tokens)
        passes = PASSES_MEASURED + len(MixedBytes(facts, self.formats).candidates[facts.embedding])
        measured = passes * MEASURED_TOKENS + PASSES_FITTED * FITTED_TOKENS
        return StageCost(gptq.forward_tokens + measured, gptq.held_bytes)

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A student that is quantized already; a target that no mixture of grids can meet."""
        if quantized:
            return ["the student is quantized already: one stage a rung decides the integers"]
        sizes = MixedBytes(facts, self.formats)
        stuck = [name for name, grids in sizes.candidates.items() if not grids]
        if stuck:
            together = " and ".join(sizes.formats)
            return [f"{stuck[0]} fits on no grid of 2, 3, 4, 5 or 8 bits that {together} hold"]
        if sizes.least <= self.target_bytes(facts) <= sizes.most:
            return []
        key, unit = ("size_mb", 1e6) if self.size_mb else ("bits_per_weight", facts.parameters / 8)
        stated, least, most = (
            b / unit for b in (self.target_bytes(facts), sizes.least, sizes.most)
        )
        return [
            f"{key}: {stated:.5g} cannot be met: on grids that {' and '.join(sizes.formats)} hold "
            f"this student takes {least:.4g} to {most:.4g}"
        ]

    @property
    def keeps_work(self) -> bool:
        """What was measured, the finished blocks, and the hidden states that enter the next."""
        return True

    def run(self, src: Path, dst: Path) -> None:
        """Measure, allocate, quantize; ``allocation.json`` says who got what and why."""
        self.run_beside(src, dst, teacher=None, work=None)

    def run_beside(self, src: Path, dst: Path, *, teacher: Path | None, work: Path | None) -> None:
        """As :meth:`run`, from where a killed run was."""
        from edgedistill.allocation import allocate, describe_allocation
        from edgedistill.gptq_student import quantize_student
        from edgedistill.grid_damage import measure_damage, read_damage, write_damage

        student = Student(src)
        self.refuse_misfit(student)
        facts = student.facts
        ids = calibration_ids(src, self.calibration, self.chat)
        sizes, target = MixedBytes(facts, self.formats), self.target_bytes(facts)
        damage = read_damage(work)
        if damage is None:
            text = split_for_sensitivity(ids)
            damage = measure_damage(student, sizes.candidates, text, dst, self.calibration.seed)
            write_damage(damage, work)
        grids = allocate(sizes, damage, target)
        label = "GPTQ to mixed bits"
        quantize_student(student, dst, ids, grids.__getitem__, label=label, work=work)
        describe_allocation(facts, sizes, damage, grids, target).write(dst)


def split_for_sensitivity(ids: list[Ids]) -> SensitivityText:
    """The first sequences to measure on, the next ones to fit to; a single one serves as both."""
    import numpy as np
    import torch

    from edgedistill.grid_damage import SensitivityText

    length, whole = len(ids[0]), torch.from_numpy(np.stack(ids))
    measured = max(1, min(MEASURED_TOKENS // length, len(ids) // 2))
    fitted = whole[measured : measured + max(1, FITTED_TOKENS // length)]
    return SensitivityText(fitted if len(fitted) else whole, whole[:measured])
