"""Where ``onnxruntime-genai`` reads a ``tokenizer.json`` otherwise: the same, spelled out.

What is written cuts every text as before in ``tokenizers``, so both libraries give the same ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.student import read_json, write_json

# How byte-level BPE cuts text, GPT-2's expression: tokenizers' ByteLevel applies it by default.
BYTE_LEVEL_CUTS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As Gemma's own file has it.
CUT_AT_BLANKS = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def spell_out_pre_tokenizer(path: Path) -> None:
    """Rewrite a ``tokenizer.json`` in place whose pre-tokenizer genai 0.18 takes for another.

    Args:
        path: of the file; nothing happens where there is none.
    """
    if not path.is_file():
        return
    tokenizer = read_json(path)
    before = tokenizer.get("pre_tokenizer")
    spelled = _whole_text(tokenizer.get("normalizer")) if before is None else _digits(before)
    if spelled is not None:
        write_json(path, tokenizer | {"pre_tokenizer": spelled})


def _whole_text(normalizer: Any) -> dict[str, Any] | None:
    """Of a tokenizer of SentencePiece's kind, which cuts nothing before it merges.

    Where a file names no pre-tokenizer, genai cuts words by an expression of its own, and pieces
    such as ``²,`` never come to be.  Where it splits at a string, genai cuts nothing; and there is
    no blank left to split at, since the normalizer has replaced them all.
    """
    if not isinstance(normalizer, dict) or normalizer.get("type") != "Replace":
        return None
    replaces_blanks = normalizer.get("pattern") == {"String": " "}
    return CUT_AT_BLANKS if replaces_blanks and " " not in normalizer.get("content", " ") else None


def _digits(before: dict[str, Any]) -> dict[str, Any] | None:
    """Of one that cuts digits one by one: the expressions that it stands for.

    genai takes ``Digits`` for decimal digits alone, so that it joins a blank with a following ½ or
    ²; as expressions it follows both.
    """
    parts = before.get("pretokenizers", [])
    if [part.get("type") for part in parts] != ["Digits", "ByteLevel"]:
        return None
    digits, byte_level = parts
    if not digits.get("individual_digits") or not byte_level.get("use_regex", True):
        return None
    cuts = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in (r"\p{N}", BYTE_LEVEL_CUTS)
    ]
    return before | {"pretokenizers": [*cuts, byte_level | {"use_regex": False}]}
