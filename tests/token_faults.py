"""Faults of tokenizer, template, special tokens and claims: the model stays, its use goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf

from tests.artifact_tensors import CORE_ML, read_spec, rewrite_gguf
from tests.mutations import Fault, Plant, in_file, in_json

IDS = "tokenizer: ids"
TEMPLATE = "template: conversations"
BOS, EOS = "tokens: bos", "tokens: eos"
CONTEXT_LENGTH = "lint: context length"
BEGIN = "<|im_start|>"
STALE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\n' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
DEAF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def in_metadata(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """Change a GGUF's metadata: key -> value goes in, what is to be replaced comes out."""

    def run(artifact: Path) -> None:
        fields = gguf.GGUFReader(artifact / "model.gguf").fields
        rewrite_gguf(artifact, change({key: field.contents() for key, field in fields.items()}))

    return in_file(run)


def fault_of_tokenizer(
    name: str,
    in_gguf: Callable[[dict[str, Any]], dict[str, Any]],
    in_tokenizer: Callable[[Any], None],
    caught_by: str = IDS,
) -> Fault:
    """In a GGUF's metadata; in ``tokenizer.json`` of the other formats."""
    beside = in_json("tokenizer.json", in_tokenizer)
    plants = {"gguf": in_metadata(in_gguf), "onnx": beside, "coreml": beside}
    return Fault(name, (caught_by,), plants)


def fault_of_template(name: str, template: str) -> Fault:
    """Another template in a GGUF's metadata, or beside the weights."""
    beside = in_file(lambda artifact: _write(artifact / "chat_template.jinja", template))
    inside = in_metadata(lambda _: {"tokenizer.chat_template": template})
    return Fault(name, (TEMPLATE,), {"gguf": inside, "onnx": beside, "coreml": beside})


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _swapped_in_list(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    left, right = tokens.index("e"), tokens.index("t")
    tokens[left], tokens[right] = tokens[right], tokens[left]
    return {"tokenizer.ggml.tokens": tokens}


def _swap_in_vocabulary(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def _lose_digit_splitting(tokenizer: Any) -> None:
    before = tokenizer["pre_tokenizer"]
    # The ONNX package spells it out as expressions: the first one cuts digits.
    before["pretokenizers"] = before["pretokenizers"][1:]


def _lose_merges(tokenizer: Any) -> None:
    del tokenizer["model"]["merges"][:40]


def _make_ordinary(tokenizer: Any) -> None:
    """The token that begins a turn is cut like any text."""
    added = tokenizer["added_tokens"]
    added[:] = [entry for entry in added if entry["content"] != BEGIN]


def _make_ordinary_in_list(metadata: dict[str, Any]) -> dict[str, Any]:
    types = list(metadata["tokenizer.ggml.token_type"])
    types[metadata["tokenizer.ggml.tokens"].index(BEGIN)] = 1
    return {"tokenizer.ggml.token_type": types}


def _put_begin_before(tokenizer: Any) -> None:
    number = next(e["id"] for e in tokenizer["added_tokens"] if e["content"] == BEGIN)
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [number], "tokens": [BEGIN]}},
    }


def _end_at(ends: Any) -> dict[str, Plant]:
    """The files beside the weights say that a text ends elsewhere."""

    def in_package(config: Any) -> None:
        config["model"]["eos_token_id"] = ends

    def in_generation(config: Any) -> None:
        config["eos_token_id"] = ends

    return {
        "onnx": in_json("genai_config.json", in_package),
        "coreml": in_json("generation_config.json", in_generation),
    }


def _claim_in_package(config: Any) -> None:
    config["model"]["context_length"] = 4096


def _claim_in_core_ml(artifact: Path) -> None:
    spec = read_spec(artifact)
    spec.description.metadata.userDefined["context_tokens"] = "4096"
    (artifact / CORE_ML / "model.mlmodel").write_bytes(spec.SerializeToString())


TOKEN_FAULTS = [
    fault_of_tokenizer(
        "two tokens of the vocabulary swapped", _swapped_in_list, _swap_in_vocabulary
    ),
    fault_of_tokenizer(
        "digit splitting lost",
        lambda _: {"tokenizer.ggml.pre": "gpt-2"},
        _lose_digit_splitting,
    ),
    fault_of_tokenizer(
        "the first merges lost",
        lambda m: {"tokenizer.ggml.merges": m["tokenizer.ggml.merges"][40:]},
        _lose_merges,
    ),
    fault_of_tokenizer("a special token that is ordinary", _make_ordinary_in_list, _make_ordinary),
    fault_of_tokenizer(
        "BOS doubled",
        lambda _: {"tokenizer.ggml.add_bos_token": True},
        _put_begin_before,
        caught_by=BOS,
    ),
    Fault(
        "EOS changed",
        (EOS,),
        {"gguf": in_metadata(lambda _: {"tokenizer.ggml.eos_token_id": 1})} | _end_at([1]),
    ),
    Fault("one of two ends lost", (EOS,), _end_at([2])),
    fault_of_template("a stale chat template", STALE_TEMPLATE),
    fault_of_template("a template that drops the system message", DEAF_TEMPLATE),
    fault_of_template("a template that trims messages", TRIMMING_TEMPLATE),
    Fault(
        "more context claimed than there is",
        (CONTEXT_LENGTH,),
        {
            "gguf": in_metadata(lambda _: {"llama.context_length": 4096}),
            "onnx": in_json("genai_config.json", _claim_in_package),
            "coreml": in_file(_claim_in_core_ml),
        },
    ),
]
