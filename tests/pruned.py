"""Pruned students and what judges them: ``transformers`` in float32, on a text of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgedistill.healing_results import HEALING_FILE, Healing
from edgedistill.stages.heal import Heal
from edgedistill.student import Student, StudentWriter, read_json, write_json
from tests.tiny import write_student

Change = Callable[[str, npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def load(student: Path) -> Any:
    """The student in ``transformers``, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()


def random_ids(count: int = 2, tokens: int = 48, seed: int = 5) -> torch.Tensor:
    """int64 [count, tokens] below 256."""
    return torch.randint(3, 256, (count, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [count, tokens, vocab]."""
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """KL(reference || other) from logits, written out by its definition in float64."""
    p, q = (x.double().softmax(-1) for x in (reference, other))
    return float((p * (p.log() - q.log())).sum(-1).mean())


def heal(stage: Heal, src: Path, dst: Path, teacher: Path, work: Path | None = None) -> Healing:
    """Run the stage into a new directory; what it says of itself."""
    stage.run_beside(src, empty(dst), teacher=teacher, work=work)
    return Healing.model_validate_json((dst / HEALING_FILE).read_bytes())


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Of every file, by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def edited(student: Path, dst: Path, change: Change) -> Path:
    """A copy of a student with every tensor changed by a function of its name and values."""
    source = Student(student)
    dst.mkdir()
    with StudentWriter(dst, source) as writer:
        for name in source.names():
            writer.write(name, change(name, source.read(name).copy()))
    return dst


def without_effect(student: Path, dst: Path, layers: tuple[int, ...]) -> Path:
    """A copy in which some blocks add nothing to the stream, whatever they compute."""

    def change(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        silent = any(f"layers.{layer}." in name for layer in layers)
        if silent and ("o_proj" in name or "down_proj" in name):
            values[:] = 0.0
        return values

    return edited(student, dst, change)


def empty(directory: Path) -> Path:
    """A new directory."""
    directory.mkdir(parents=True)
    return directory


def folded_multiplier(directory: Path) -> tuple[Path, Path]:
    """Two students that compute the same: a residual multiplier of 1/2, and halved matrices."""
    apart = write_student(directory / "apart", "granite", residual_multiplier=0.5)

    def halve(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        exits = name.endswith(("o_proj.weight", "down_proj.weight"))
        return values * np.float32(0.5) if exits else values

    folded = edited(apart, directory / "folded", halve)
    config = read_json(folded / "config.json") | {"residual_multiplier": 1.0}
    write_json(folded / "config.json", config)
    return apart, folded
