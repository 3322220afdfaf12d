"""Read and write student directories in the Hugging Face layout, a tensor at a time.

A quantized tensor ``X`` is stored as ``X.codes`` (packed, first element in the low bits),
``X.scales`` and, on a grid with integer zeros, ``X.zeros``; its grid stands in ``grids.json``.
Float matrices that the family's checkpoints fuse (:mod:`edgedistill.fused_tensors`) are stored
fused, and read and written one by one; quantized ones are stored one by one too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.fused_tensors import FusedParts, fused_tensors
from edgedistill.quantized import FIXED_ZERO, Grid, QTensor, pack_codes, unpack_codes
from edgedistill.safetensors_file import SafetensorsFile, StoredTensor

GRIDS_FILE = "grids.json"
INDEX_FILE = "model.safetensors.index.json"
# What a student with a part of a vocabulary kept of the whole one; see kept_vocabulary.py.
VOCABULARY_MAP_FILE = "vocabulary_map.json"
SHARD_BYTES = 256 * 1024 * 1024
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Student:
    """A student directory; opening it reads the headers alone.

    Raises:
        InputError: no config, no safetensors, pickled weights, a truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        files = _open_weights(path)
        _take_apart(files, fused_tensors(self.config, where=str(path / "config.json")))
        self._files = {name: file for file in files for name in file.tensors}
        self.grids: dict[str, Grid] = _read_grids(path / GRIDS_FILE)

    @property
    def facts(self) -> DecoderFacts:
        """The family facts that its config states."""
        return DecoderFacts.from_config(self.config, where=str(self.path / "config.json"))

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor lies on a grid."""
        return bool(self.grids)

    def names(self) -> list[str]:
        """All tensors, sorted; a quantized one appears under its own name, once."""
        parts = {f"{name}{suffix}" for name in self.grids for suffix in _SUFFIXES}
        return sorted((set(self._files) - parts) | set(self.grids))

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self.grids

    def stored(self, name: str) -> StoredTensor:
        """Place, dtype and shape of a float tensor."""
        if name not in self._files:
            raise InputError(
                f"has no tensor {name}",
                where=str(self.path),
                hint="the checkpoint is incomplete, or its config names another architecture",
            )
        return self._files[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor, unpacked."""
        if name not in self.grids:
            return self.stored(name).shape
        rows, groups = self.stored(f"{name}.scales").shape
        return rows, groups * self.grids[name].group_size

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32, dequantized if it is quantized."""
        if name in self.grids:
            return self.read_quantized(name).dequantize()
        self.stored(name)
        return self._files[name].read(name).astype(np.float32, copy=False)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start .. stop - 1 of a float tensor (elements of a vector) as float32."""
        self.stored(name)
        rows = self._files[name].read(name, slice(start, stop))
        return rows.astype(np.float32, copy=False)

    def read_quantized(self, name: str) -> QTensor:
        """The integers, scales and zeros of a quantized tensor."""
        grid = self.grids[name]
        packed, scales = (self.read_part(name, suffix) for suffix in (".codes", ".scales"))
        zeros = self.read_part(name, ".zeros") if grid.zero == "integer" else None
        codes = unpack_codes(packed, grid.bits, scales.shape[1] * grid.group_size)
        return QTensor(grid, codes, scales, zeros)

    def read_part(self, name: str, suffix: str) -> npt.NDArray[Any]:
        """``.codes`` (packed), ``.scales`` or ``.zeros`` of a quantized tensor, as stored."""
        self.stored(name + suffix)
        return self._files[name + suffix].read(name + suffix)


_SUFFIXES = (".codes", ".scales", ".zeros")


class StudentWriter:
    """Writes a student directory in bounded memory: at most one shard is held.

    Beside it those float parts of fused tensors whose others have not come yet.

    Args:
        dst: an empty directory.
        like: the student whose config and tokenizer files are carried over, if there is one.
        config: replaces that config, when the shape changes; required without ``like``.
    """

    def __init__(
        self, dst: Path, like: Student | None = None, config: dict[str, Any] | None = None
    ) -> None:
        if config is None:
            if like is None:
                raise ValueError("a new student needs a config, or a student to be like")
            config = like.config
        self._dst = dst
        self._config = config
        self._fused = FusedParts(fused_tensors(config, where=str(dst / "config.json")))
        self._grids: dict[str, Grid] = {}
        self._shard: dict[str, npt.NDArray[Any]] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        if like is not None:
            copy_side_files(like.path, dst)
            if (like.path / VOCABULARY_MAP_FILE).is_file():
                shutil.copyfile(like.path / VOCABULARY_MAP_FILE, dst / VOCABULARY_MAP_FILE)

    def write(self, name: str, value: npt.NDArray[Any] | QTensor) -> None:
        """Add a tensor: a float array is stored in its dtype, a QTensor packed."""
        if not isinstance(value, QTensor):
            for stored, values in self._fused.add(name, value).items():
                self._add(stored, values)
            return
        self.write_packed(name, value.grid, packed_arrays(name, value))

    def write_packed(self, name: str, grid: Grid, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Add a quantized tensor as :func:`packed_arrays` of it."""
        self._grids[name] = grid
        for stored, values in arrays.items():
            self._add(stored, values)

    def close(self) -> None:
        """Write what is still held, the index and the config."""
        for name, values in self._fused.rest().items():
            self._add(name, values)
        self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._dst / f"shard-{number}").rename(self._dst / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self._dst / INDEX_FILE, index)
        write_json(self._dst / "config.json", self._config)
        if self._grids:
            write_json(self._dst / GRIDS_FILE, {n: vars(g) for n, g in self._grids.items()})

    def _add(self, name: str, array: npt.NDArray[Any]) -> None:
        held = sum(a.nbytes for a in self._shard.values())
        if self._shard and held + array.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = np.ascontiguousarray(array)

    def _flush(self) -> None:
        from safetensors.numpy import save_file

        if not self._shard:
            return
        save_file(self._shard, self._dst / f"shard-{len(self._shards) + 1}", {"format": "pt"})
        self._total_bytes += sum(a.nbytes for a in self._shard.values())
        self._shards.append(list(self._shard))
        self._shard = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()


def packed_arrays(name: str, value: QTensor) -> dict[str, npt.NDArray[Any]]:
    """What a quantized tensor is stored as, by the names in the file."""
    arrays: dict[str, npt.NDArray[Any]] = {
        f"{name}.codes": pack_codes(value.codes, value.grid.bits),
        f"{name}.scales": value.scales,
    }
    if value.zeros is not None:
        arrays[f"{name}.zeros"] = value.zeros
    return arrays


def dequantize_student(src: Path, dst: Path) -> None:
    """Write a float32 copy of a student that opens in ``transformers``."""
    student = Student(src)
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            writer.write(name, student.read(name))


def copy_side_files(src: Path, dst: Path) -> None:
    """Copy tokenizer, chat template and generation config from a student directory."""
    for name in SIDE_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is missing or not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {path.name}",
            where=str(path.parent),
            hint="a student is a directory in the Hugging Face layout, or a GGUF file",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read as JSON ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise InputError("is not a JSON object", where=str(path))
    if "\\ud" in text.lower():
        _refuse_half_characters(value, path)
    return value


def _refuse_half_characters(value: dict[str, Any], path: Path) -> None:
    """JSON may spell half of a surrogate pair, which no file could be written with."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("holds text that is not Unicode", where=str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON with stable bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_grids(path: Path) -> dict[str, Grid]:
    stated = read_json(path) if path.exists() else {}
    grids = {}
    for name, fields in stated.items():
        try:
            grids[name] = Grid(**fields)
        except TypeError as error:
            raise InputError(f"{name} has no whole grid: {fields}", where=str(path)) from error
        if grids[name].bits not in FIXED_ZERO or grids[name].zero not in ("fixed", "integer"):
            raise InputError(f"{name} has an unknown grid: {fields}", where=str(path))
    return grids


def _take_apart(files: list[SafetensorsFile], fused: dict[str, dict[str, int]]) -> None:
    present = {name for file in files for name in file.tensors}
    for file in files:
        for name in fused.keys() & file.tensors.keys():
            twice = sorted(present & fused[name].keys())
            if twice:
                raise InputError(f"holds {twice[0]} beside {name}", where=str(file.path))
            file.split_rows(name, fused[name])


def _open_weights(path: Path) -> list[SafetensorsFile]:
    if (path / INDEX_FILE).exists():
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError("has no weight_map", where=str(path / INDEX_FILE))
        names = sorted({str(file) for file in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise InputError(f"names a shard outside: {name}", where=str(path / INDEX_FILE))
        return [SafetensorsFile(path / name) for name in names]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return [SafetensorsFile(file) for file in files]
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise InputError(
            f"holds pickled weights ({pickles[0]}), which can run code when they are opened",
            where=str(path),
            hint="convert them to safetensors where they are trusted: "
            "model.save_pretrained(dir, safe_serialization=True)",
        )
    raise InputError("holds no *.safetensors", where=str(path), hint="is it the right directory?")
