"""Merge a peft LoRA adapter into the weights: ``W += (alpha / r) B A`` (Hu et al., 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError, StageError
from edgedistill.progress import track
from edgedistill.safetensors_file import SafetensorsFile
from edgedistill.stage import Stage
from edgedistill.student import PICKLES, Student, StudentWriter, read_json

_LORA_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Options of peft that change what the adapter computes and that a plain merge would lose.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
)
EFFECT_TOLERANCE = 1e-3


class MergeLora(Stage):
    """Merge one adapter; several stages merge several, in order.

    Attributes:
        adapter: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
    """

    adapter: Path

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A quantized student; an adapter that is damaged or made for another shape."""
        if quantized:
            return ["an adapter cannot be merged into quantized weights: merge it before"]
        try:
            Adapter(self.adapter, facts.fused_tensors()).check(facts.tensor_shapes())
        except InputError as error:
            return [str(error)]
        return []

    def run(self, src: Path, dst: Path) -> None:
        """Write the merged student; matrices that the adapter touches become float32.

        Raises:
            InputError: the adapter does not fit, or has no effect.
            StageError: its effect is not in the merged weights.
        """
        student = Student(src)
        adapter = Adapter(self.adapter, student.facts.fused_tensors())
        adapter.check({name: student.shape(name) for name in student.names()})
        with StudentWriter(dst, student) as writer:
            for name in track(student.names(), label="merging the adapter"):
                values = student.read(name)
                if name in adapter.pairs:
                    values = (values + adapter.delta(name)).astype(np.float32)
                writer.write(name, values)
        _check_effect(student, Student(dst), adapter)


@dataclass(frozen=True)
class _Pair:
    a: str  # [r, in]
    b: str  # [out, r]
    rows: range  # of b


class Adapter:
    """A peft LoRA adapter on disk; ``pairs`` maps tensor names of the student to its factors.

    Args:
        path: of its directory.
        fused: tensors that ``transformers`` has as one, and so the adapter too: name -> their
            parts' names in the student, with the rows of each, in order.
    """

    def __init__(self, path: Path, fused: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self.path = path
        self.config = read_json(path / "adapter_config.json")
        self._refuse_unsupported()
        weights = path / "adapter_model.safetensors"
        if not weights.exists() and any(f for p in PICKLES for f in path.glob(p)):
            raise InputError(
                "holds pickled weights, which can run code when they are opened",
                where=str(path),
                hint="save it as safetensors: model.save_pretrained(dir, safe_serialization=True)",
            )
        self._file = SafetensorsFile(weights)
        self.pairs = self._parts(self._read_pairs(), fused or {})

    def scaling(self, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA (2312.03732)."""
        alpha = float(self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def delta(self, name: str) -> npt.NDArray[np.float64]:
        """What the adapter adds to the tensor ``name``: float64 [out, in]."""
        pair = self.pairs[name]
        a, b = (self._file.read(part).astype(np.float64) for part in (pair.a, pair.b))
        rows = b[pair.rows.start : pair.rows.stop]
        product: npt.NDArray[np.float64] = (rows @ a) * self.scaling(a.shape[0])
        return product

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Hold every pair against the student's shapes.

        Raises:
            InputError: a tensor that the student lacks, or of another shape.
        """
        for name, pair in self.pairs.items():
            a, b = (self._file.tensors[part].shape for part in (pair.a, pair.b))
            rows = len(pair.rows)
            if name not in shapes:
                raise InputError(
                    f"adapts {name}, which the student does not have",
                    where=str(self.path),
                    hint="the adapter was trained on another model",
                )
            if (rows, a[1]) != tuple(shapes[name]) or a[0] != b[1]:
                raise InputError(
                    f"adapts {name} as {rows}x{a[1]} (rank {a[0]}/{b[1]}), "
                    f"the student's is {'x'.join(map(str, shapes[name]))}",
                    where=str(self.path),
                    hint="the adapter was trained on a model of another shape",
                )

    def _refuse_unsupported(self) -> None:
        used = [key for key in _UNSUPPORTED if self.config.get(key)]
        if self.config.get("peft_type") != "LORA":
            used.append(f"peft_type {self.config.get('peft_type')}")
        if self.config.get("bias", "none") != "none":
            used.append(f"bias {self.config['bias']!r}")
        if used:
            raise InputError(
                f"uses {', '.join(used)}, which merge_lora does not merge",
                where=str(self.path / "adapter_config.json"),
                hint="merge it with peft's merge_and_unload() and give the result as the student",
            )
        if not isinstance(self.config.get("lora_alpha"), int | float):
            raise InputError("has no lora_alpha", where=str(self.path / "adapter_config.json"))

    def _read_pairs(self) -> dict[str, _Pair]:
        factors: dict[str, dict[str, str]] = {}
        for stored, tensor in self._file.tensors.items():
            match = _LORA_NAME.fullmatch(stored)
            if not match or len(tensor.shape) != 2:
                raise InputError(
                    f"holds {stored}, which is not a factor of a linear layer",
                    where=str(self.path),
                    hint="merge_lora merges LoRA on linear layers, nothing else",
                )
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = stored
        for name, found in factors.items():
            if set(found) != {"A", "B"}:
                raise InputError(f"has half a pair for {name}", where=str(self.path))
        if not factors:
            raise InputError("is empty", where=str(self.path))
        rows = {b: range(tensor.shape[0]) for b, tensor in self._file.tensors.items()}
        return {n: _Pair(of["A"], of["B"], rows[of["B"]]) for n, of in factors.items()}

    def _parts(
        self, pairs: dict[str, _Pair], fused: Mapping[str, Mapping[str, int]]
    ) -> dict[str, _Pair]:
        """Pairs of the student's own tensors: of a fused one, each part has some rows of B."""
        found: dict[str, _Pair] = {}
        for name, pair in pairs.items():
            rows, total = fused.get(name), len(pair.rows)
            if rows is None:
                found[name] = pair
                continue
            if sum(rows.values()) != total:
                raise InputError(
                    f"adapts {name} with {total} rows, the student's has {sum(rows.values())}",
                    where=str(self.path),
                    hint="the adapter was trained on a model of another shape",
                )
            start = 0
            for part, count in rows.items():
                found[part] = _Pair(pair.a, pair.b, range(start, start + count))
                start += count
        return found


def _check_effect(before: Student, after: Student, adapter: Adapter) -> None:
    """Read the written weights back: their difference has to be the adapter's, whole and once."""
    seen = 0.0
    for name in adapter.pairs:
        delta = adapter.delta(name)
        size = float(np.vdot(delta, delta))
        seen += size
        if size == 0.0:
            continue
        moved: npt.NDArray[Any] = after.read(name).astype(np.float64) - before.read(name)
        share = float(np.vdot(moved, delta)) / size
        if abs(share - 1.0) > EFFECT_TOLERANCE:
            raise StageError(f"{share:.1%} of the adapter's effect on {name} is in the weights")
    if seen == 0.0:
        raise InputError(
            "changes no weight: all its B factors are zero",
            where=str(adapter.path),
            hint="it was saved before it was trained",
        )
