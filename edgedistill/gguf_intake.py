"""A GGUF file becomes a student directory, with the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_layout import ROPE_DIVISORS, row_order, tensor_name
from edgedistill.gguf_tokenizer import (
    adds_bos,
    build_tokenizer,
    check_tokenizer_kind,
    special_id,
)
from edgedistill.progress import track
from edgedistill.rope import Rope
from edgedistill.student import StudentWriter, write_json

# llama.cpp's architecture -> the class that opens the student in transformers.
MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Roles of special tokens: in GGUF, and in tokenizer_config.json.
TOKEN_ROLES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}
# The bands of Llama 3.1 and 3.2 (their config.json); a GGUF keeps only the divisors they give.
LLAMA3_BANDS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def convert_gguf(src: Path, dst: Path) -> None:
    """Write the model of a GGUF file as a float32 student in the Hugging Face layout.

    Args:
        src: a GGUF file, of the architecture llama (mistral too), qwen2 or qwen3.
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
    config = _config(file)
    facts = DecoderFacts.from_config(config, where=str(src))
    _check_tensors(file, facts)
    return file, config, facts


def _read(file: GgufFile, facts: DecoderFacts, name: str) -> npt.NDArray[np.float32]:
    values = file.read(tensor_name(name))
    order = row_order(facts, name)
    if order is None:
        return values
    restored = np.empty_like(values)
    restored[order] = values
    return restored


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
    wanted = {tensor_name(name): shape for name, shape in facts.tensor_shapes().items()}
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


def _config(file: GgufFile) -> dict[str, Any]:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_CLASSES:
        raise InputError(
            f"its architecture is {architecture!r}",
            where=str(file.path),
            hint=f"known: {', '.join(MODEL_CLASSES)}",
        )
    stated = _Stated(file, architecture)
    if stated.number("expert_count", 0) > 0:
        raise InputError("is a mixture of experts, which is not read", where=str(file.path))
    return {
        "architectures": [MODEL_CLASSES[architecture]],
        "model_type": architecture,
        **_shape_fields(file, stated),
        **_rope_fields(file, stated),
        **_special_ids(file.metadata),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
    }


class _Stated:
    """The numbers that the file states under its architecture's name."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file, self._prefix = file, architecture

    def text(self, key: str, default: str) -> str:
        return str(self._file.metadata.get(f"{self._prefix}.{key}", default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number, such as 1e-05 for the float32 9.999999747378752e-06; None: it is required."""
        value = self._file.metadata.get(f"{self._prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"{self._prefix}.{key} is {_brief(value)}, not a number",
                where=str(self._file.path),
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """A number of something: a whole one, above zero."""
        value = self.number(key, default)
        if not isinstance(value, int) or value <= 0:
            raise InputError(f"{self._prefix}.{key} is {value}", where=str(self._file.path))
        return value


def _brief(value: object) -> str:
    if value is None:
        return "missing"
    return "a list (it differs by layer)" if isinstance(value, list) else repr(value)


def _shape_fields(file: GgufFile, stated: _Stated) -> dict[str, Any]:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError("has no tensor token_embd.weight", where=str(file.path))
    heads, hidden = stated.count("attention.head_count"), stated.count("embedding_length")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": stated.count("feed_forward_length"),
        "num_hidden_layers": stated.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated.count("attention.head_count_kv", heads),
        "head_dim": stated.count("attention.key_length", max(1, hidden // heads)),
        "max_position_embeddings": stated.count("context_length"),
        "rms_norm_eps": stated.number("attention.layer_norm_rms_epsilon"),
    }


def _rope_fields(file: GgufFile, stated: _Stated) -> dict[str, Any]:
    theta = stated.number("rope.freq_base", 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = stated.text("rope.scaling.type", "none")
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": stated.number("rope.scaling.factor")}
    elif kind != "none":
        raise InputError(f"rope.scaling.type {kind!r} is not read", where=str(file.path))
    if ROPE_DIVISORS in file.tensors:
        parameters |= _llama3_scaling(file, theta)
    # Both spellings: transformers 5 reads rope_parameters, mlx-lm only rope_theta.
    return {"rope_theta": theta, "rope_parameters": parameters}


def _llama3_scaling(file: GgufFile, theta: float) -> dict[str, Any]:
    stored = file.read(ROPE_DIVISORS)
    if stored.ndim != 1 or stored.size == 0 or not stored.max() > 0:
        raise InputError(f"{ROPE_DIVISORS} holds no divisors", where=str(file.path))
    scaling = {"rope_type": "llama3", "factor": float(stored.max()), **LLAMA3_BANDS}
    wanted = Rope(theta, scaling).frequency_divisors(2 * stored.size)
    if not np.allclose(wanted, stored, rtol=1e-5):
        raise InputError(
            f"{ROPE_DIVISORS} is not Llama 3.1's scaling of the rotary frequencies",
            where=str(file.path),
            hint="start from the model's Hugging Face directory",
        )
    return scaling


def _special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos, eos (a list where there are several) and pad, as config.json has them."""
    ends = [special_id(metadata, role) for role in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(i for i in ends if i is not None))
    return {
        "bos_token_id": special_id(metadata, "bos"),
        "eos_token_id": distinct[0] if len(distinct) == 1 else distinct or None,
        "pad_token_id": special_id(metadata, "padding"),
    }


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
    stated = {k: v for k, v in _special_ids(metadata).items() if v is not None}
    write_json(dst / "generation_config.json", stated)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (dst / "chat_template.jinja").write_text(template, encoding="utf-8")
