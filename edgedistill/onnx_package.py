"""The files around an ONNX graph that make a package for ``onnxruntime-genai``.

Keys of ``genai_config.json``: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.errors import InputError, UnavailableError
from edgedistill.genai_tokenizer import spell_out_pre_tokenizer
from edgedistill.student import Student, copy_side_files, read_json, write_json

CONFIG_FILE = "genai_config.json"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
FIRST_LOGIT = "first_logit"
SHIPPED_ACCURACY_LEVEL = 4  # int8 activations: the fast kernels take nothing else
SAMPLING_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def write_package(student: Student, dst: Path, context_tokens: int) -> None:
    """Write ``genai_config.json``, ``config.json``, tokenizer, chat template and sampling defaults.

    Raises:
        InputError: the student names no token that ends a text.
    """
    copy_side_files(student.path, dst)
    spell_out_pre_tokenizer(dst / "tokenizer.json")
    write_json(dst / "config.json", student.config)
    generation = _optional_json(student.path / "generation_config.json")
    config = {
        "model": _model(student, generation, context_tokens),
        "search": {
            **{k: _given(generation, k, v) for k, v in SAMPLING_DEFAULTS.items()},
            "min_length": 0,
            "max_length": context_tokens,
            "num_beams": 1,
            "num_return_sequences": 1,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }
    write_json(dst / CONFIG_FILE, config)


def _model(student: Student, generation: dict[str, Any], context_tokens: int) -> dict[str, Any]:
    facts = student.facts
    ends = end_tokens(student)
    pad = _first(generation, student.config, "pad_token_id")
    begin = _first(generation, student.config, "bos_token_id")
    return {
        "type": facts.family,
        **({} if begin is None else {"bos_token_id": begin}),
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
        "vocab_size": facts.vocab_size,
        "context_length": context_tokens,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL_FILE,
            "head_size": facts.head_dim,
            "hidden_size": facts.hidden_size,
            "num_attention_heads": facts.heads,
            "num_hidden_layers": facts.layers,
            "num_key_value_heads": facts.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }


def not_installed(error: ModuleNotFoundError) -> UnavailableError:
    """What to raise where a package of the extra is missing."""
    return UnavailableError(
        f"the package {error.name} is not installed",
        hint='install it with: pip install "edgedistill[onnx]"',
    )


def end_tokens(student: Student) -> list[int]:
    """Every token that ends a text: of the generation config, else the config; and the tokenizer's.

    Many configs name ``<|endoftext|>`` alone, while the tokenizer's ``eos_token`` ends a chat turn.

    Raises:
        InputError: there is none.
    """
    generation = _optional_json(student.path / "generation_config.json")
    stated = _first(generation, student.config, "eos_token_id")
    ends: list[int] = stated if isinstance(stated, list) else [] if stated is None else [stated]
    ends = [*ends, *_tokenizer_end(student.path)]
    if not ends:
        raise InputError(
            "names no eos_token_id, so that generation would never end",
            where=str(student.path / "config.json"),
            hint="add eos_token_id to generation_config.json",
        )
    return list(dict.fromkeys(ends))


def _tokenizer_end(path: Path) -> list[int]:
    token = _optional_json(path / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    added = _optional_json(path / "tokenizer.json").get("added_tokens", [])
    return [int(entry["id"]) for entry in added if entry.get("content") == content]


def _first(generation: dict[str, Any], config: dict[str, Any], key: str) -> Any:
    return _given(generation, key, config.get(key))


def _given(values: dict[str, Any], key: str, otherwise: Any) -> Any:
    value = values.get(key)
    return otherwise if value is None else value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def graph_file(artifact: Path) -> Path:
    """The graph of a directory: what ``genai_config.json`` names, ``model.onnx``, or the only one.

    Raises:
        InputError: there is none, or there are several.
    """
    name = decoder_config(artifact).get("filename")
    if isinstance(name, str) and Path(name).name == name and (artifact / name).is_file():
        return artifact / name
    found = sorted(artifact.glob("*.onnx"))
    named = [path for path in found if path.name == MODEL_FILE] or found
    if len(named) != 1:
        raise InputError(f"holds {len(found)} ONNX graphs, not one", where=str(artifact))
    return named[0]


def decoder_config(artifact: Path) -> dict[str, Any]:
    """What ``genai_config.json`` says of the decoder; empty if it is not there.

    Raises:
        InputError: it is no JSON object.
    """
    if not (artifact / CONFIG_FILE).is_file():
        return {}
    model = read_json(artifact / CONFIG_FILE).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    return decoder if isinstance(decoder, dict) else {}


def follows_our_convention(graph: Path) -> bool:
    """Whether a graph takes ``first_logit``, as those of our exporter do.

    Raises:
        InputError: it is no ONNX model.
        UnavailableError: the ``onnx`` package is not installed.
    """
    try:
        from edgedistill.onnx_graph import read_model
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    return FIRST_LOGIT in {value.name for value in read_model(graph).graph.input}
