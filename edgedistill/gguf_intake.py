"""A GGUF file becomes a student directory, with the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.gguf_config import gguf_config, special_ids
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_layout import ROPE_DIVISORS, checkpoint_values, tensor_name
from edgedistill.gguf_tokenizer import (
    adds_bos,
    build_tokenizer,
    check_tokenizer_kind,
    special_id,
)
from edgedistill.progress import track
from edgedistill.student import StudentWriter, write_json

# Roles of special tokens: in GGUF, and in tokenizer_config.json.
TOKEN_ROLES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}


def convert_gguf(src: Path, dst: Path) -> None:
    """Write the model of a GGUF file as a float32 student in the Hugging Face layout.

    Args:
        src: a GGUF file of an architecture in ``gguf_config.MODELS`` (mistral is llama there).
        dst: an empty directory; tensors go there one by one.

    Raises:
        InputError: the file is missing, truncated, not a GGUF, or of a model or tokenizer that is
            not known here.
    """
    file, config, facts = _open(src)
    _write_tokenizer(file, dst, facts.max_context_tokens)
    with StudentWriter(dst, config=config) as writer:
        for name in track(list(facts.tensor_shapes()), label=f"reading {src.name}"):
            writer.write(name, _read(file, facts, name))


def read_gguf_facts(src: Path) -> DecoderFacts:
    """The facts of the model in a GGUF file: its header is checked, no tensor is read.

    Raises:
        InputError: as :func:`convert_gguf`, apart from what only the tokenizer's lists tell.
    """
    file, _, facts = _open(src)
    check_tokenizer_kind(file.metadata, str(src))
    return facts


def _open(src: Path) -> tuple[GgufFile, dict[str, Any], DecoderFacts]:
    file = GgufFile(src)
    _refuse_parts(file)
    config = gguf_config(file)
    facts = DecoderFacts.from_config(config, where=str(src))
    _check_tensors(file, facts)
    return file, config, facts


def _read(file: GgufFile, facts: DecoderFacts, name: str) -> npt.NDArray[np.float32]:
    return checkpoint_values(facts, name, file.read(tensor_name(facts, name)))


def _refuse_parts(file: GgufFile) -> None:
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"is a GGUF of the type {kind!r}, not a model", where=str(file.path))
    parts = file.metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise InputError(
            f"is one of {parts} parts of a split GGUF",
            where=str(file.path),
            hint="join the parts with llama-gguf-split --merge",
        )


def _check_tensors(file: GgufFile, facts: DecoderFacts) -> None:
    wanted = {tensor_name(facts, name): shape for name, shape in facts.tensor_shapes().items()}
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise InputError(f"has no tensor {name}", where=str(file.path))
        if file.tensors[name].shape != shape:
            raise InputError(
                f"{name} has the shape {file.tensors[name].shape}, its metadata ask for {shape}",
                where=str(file.path),
            )
    extra = sorted(set(file.tensors) - set(wanted) - {ROPE_DIVISORS})
    if extra:
        raise InputError(
            f"holds {extra[0]}, which the {facts.family} family does not have",
            where=str(file.path),
            hint="the model is a variant that edgedistill does not know yet",
        )


def _write_tokenizer(file: GgufFile, dst: Path, context_tokens: int) -> None:
    metadata, where = file.metadata, str(file.path)
    build_tokenizer(metadata, where).save(str(dst / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: special_id(metadata, role) for role, name in TOKEN_ROLES.items()}
    config: dict[str, Any] = {
        # The generic class: a family's own would put its own pre-tokenizer in place of this one.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[i] for name, i in ids.items() if i is not None},
        "add_bos_token": adds_bos(metadata, where),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
    }
    write_json(dst / "tokenizer_config.json", config)
    stated = {k: v for k, v in special_ids(metadata).items() if v is not None}
    write_json(dst / "generation_config.json", stated)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (dst / "chat_template.jinja").write_text(template, encoding="utf-8")
