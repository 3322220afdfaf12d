"""The pre-tokenizers of byte-level BPE: their names in GGUF, their form in ``tokenizer.json``.

GGUF names how text is cut before the merges (``tokenizer.ggml.pre``), ``tokenizer.json`` spells it
out; one table serves both directions.  It has only those that llama.cpp and ``tokenizers`` cut
alike, which the tests prove for each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split_then_bytes(regex: str) -> dict[str, Any]:
    pattern = {"Regex": regex}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text before the merges.

    Attributes:
        names: in GGUF; the first is written, the others mean the same to llama.cpp.
        structure: the ``pre_tokenizer`` of a ``tokenizer.json``.
        ignore_merges: whether a piece that is a token as a whole is taken without merging.
        adds_bos: what llama.cpp does where the file does not say.
    """

    names: tuple[str, ...]
    structure: dict[str, Any]
    ignore_merges: bool = False
    adds_bos: bool = False


# Sources: each model's own tokenizer.json; the names are those of llama.cpp's src/llama-vocab.cpp.
PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2", "phi-2", "olmo"), _byte_level(use_regex=True)),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r"),
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                _byte_level(use_regex=True),
            ],
        },
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3"),
        _split_then_bytes(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
        ignore_merges=True,
        adds_bos=True,
    ),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen"),
        _split_then_bytes(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"),
    ),
)


def pre_tokenizer_named(name: object, where: str) -> PreTokenizer:
    """The pre-tokenizer that a GGUF file names.

    Raises:
        InputError: it is none of those whose cut is known to be the same in both worlds.
    """
    for candidate in PRE_TOKENIZERS:
        if name in candidate.names:
            return candidate
    known = ", ".join(n for candidate in PRE_TOKENIZERS for n in candidate.names)
    raise InputError(
        f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that edgedistill does not know",
        where=where,
        hint=f"known: {known}; or start from the model's Hugging Face directory",
    )


def pre_tokenizer_of(tokenizer: dict[str, Any], where: str) -> PreTokenizer:
    """The pre-tokenizer that a ``tokenizer.json`` spells out, found by its structure.

    Args:
        tokenizer: the parsed file.
        where: its path, for errors.

    Raises:
        InputError: llama.cpp has none that cuts like it.
    """
    structure = _canonical(tokenizer.get("pre_tokenizer"))
    ignores = bool(tokenizer["model"].get("ignore_merges", False))
    for candidate in PRE_TOKENIZERS:
        if _canonical(candidate.structure) == structure and candidate.ignore_merges == ignores:
            return candidate
    raise InputError(
        f"llama.cpp has no pre-tokenizer that is known to cut like {json.dumps(structure)} "
        f"(ignore_merges: {json.dumps(ignores)})",
        where=where,
        hint=f"known: {', '.join(candidate.names[0] for candidate in PRE_TOKENIZERS)}",
    )


def _canonical(structure: Any) -> Any:
    """The same structure without what does not change the ids."""
    if not isinstance(structure, dict):
        return structure
    if structure.get("type") == "Sequence":
        steps = [_canonical(step) for step in structure["pretokenizers"]]
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    canonical = {key: value for key, value in structure.items() if key != "trim_offsets"}
    if canonical.get("type") == "Split" and canonical.get("behavior") == "Removed":
        # These expressions match all of a text, so removing what does not match removes nothing.
        return canonical | (
            {"behavior": "Isolated", "invert": False} if canonical["invert"] else {}
        )
    return canonical
