"""The tokenizer of a student directory, as GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgedistill.errors import InputError
from edgedistill.gguf_pretokenizers import pre_tokenizer_of
from edgedistill.gguf_sentencepiece import BYTE_TOKEN, SPACE, has_byte_fallback, score_tokens
from edgedistill.gguf_tokenizer import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    SENTENCEPIECE,
    UNUSED,
    USER_DEFINED,
)
from edgedistill.student import Student, read_json


@dataclass(frozen=True)
class GgufVocabulary:
    """All that a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2`` or ``llama``, GGUF's names of byte-level BPE and BPE with byte fallback.
        pre: name of the pre-tokenizer.
        tokens: one string an id, as many as the embedding has rows.
        types: ``tokenizer.ggml.token_type``, one a token.
        merges: ``left right``, most important first; empty where ``scores`` say it.
        scores: of each token the higher the earlier it is merged; None where ``merges`` say it.
        ids: role (``bos``, ``eos``, ``eot``, ``eom``, ``unknown``, ``padding``) -> id.
        adds_bos: whether BOS goes before a text; ``adds_eos`` EOS behind it.
        chat_template: Jinja, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def read_vocabulary(student: Student) -> GgufVocabulary:
    """Read tokenizer, special tokens, generation config and chat template of a student.

    Raises:
        InputError: llama.cpp cannot tokenize the same way, or a file is missing or contradicts
            another.
    """
    where = str(student.path / "tokenizer.json")
    tokenizer = read_json(student.path / "tokenizer.json")
    _refuse_foreign(tokenizer, where)
    fallback = has_byte_fallback(tokenizer)
    pre = "default" if fallback else pre_tokenizer_of(tokenizer, where).names[0]
    tokens, types = _tokens_and_types(tokenizer, student.facts.vocab_size, where)
    pairs = [_merge_pair(merge, where) for merge in tokenizer["model"]["merges"]]
    scores = score_tokens(tokenizer, tokens, pairs, where) if fallback else None
    config = read_json(student.path / "tokenizer_config.json")
    ids = _special_ids(student, config, tokens)
    adds = {role: _adds(student, role, ids.get(role)) for role in ("bos", "eos")}
    return GgufVocabulary(
        model=SENTENCEPIECE if fallback else BYTE_LEVEL,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if fallback else [_merge_line(pair, where) for pair in pairs],
        scores=scores,
        ids=ids,
        adds_bos=adds["bos"],
        adds_eos=adds["eos"],
        chat_template=_chat_template(student, config),
    )


def _refuse_foreign(tokenizer: dict[str, Any], where: str) -> None:
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    problem = None
    if model.get("type") != "BPE":
        problem = f"a {model.get('type')} model"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        problem = "BPE with prefixes or suffixes"
    elif has_byte_fallback(tokenizer):
        pass  # told apart when its tokens are scored
    elif normalizer is not None and normalizer.get("type") != "NFC":
        # NFC is Qwen's; llama.cpp leaves it out, which shows in decomposed text alone.
        problem = f"the normalizer {normalizer.get('type')}"
    if problem:
        raise InputError(
            f"has {problem}; only byte-level BPE, and BPE with byte fallback, can be carried into "
            "a GGUF file",
            where=where,
        )
    for added in tokenizer.get("added_tokens", []):
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise InputError(
                f"the added token {added['content']!r} takes the white space around it, "
                "which llama.cpp would not",
                where=where,
            )


def _tokens_and_types(
    tokenizer: dict[str, Any], vocab_size: int, where: str
) -> tuple[list[str], list[int]]:
    named = {int(i): token for token, i in tokenizer["model"]["vocab"].items()}
    added = {int(entry["id"]): entry for entry in tokenizer.get("added_tokens", [])}
    named |= {i: entry["content"] for i, entry in added.items()}
    if named and max(named) >= vocab_size:
        raise InputError(
            f"has the token {max(named)}, the model's vocabulary only {vocab_size} rows",
            where=where,
        )
    # Rows of the embedding without a token (padding) need a name of their own.
    tokens = [named.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [NORMAL if i in named else UNUSED for i in range(vocab_size)]
    fallback = has_byte_fallback(tokenizer)
    if fallback:
        types = [BYTE if BYTE_TOKEN.fullmatch(t) else k for t, k in zip(tokens, types, strict=True)]
    for i, entry in added.items():
        types[i] = CONTROL if entry.get("special") else USER_DEFINED
        if fallback and types[i] == USER_DEFINED:
            # llama.cpp finds such tokens in the text before it replaces spaces.
            tokens[i] = tokens[i].replace(SPACE, " ")
    return tokens, types


def _merge_pair(merge: str | list[str], where: str) -> tuple[str, str]:
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise InputError(f"the merge {merge!r} is not of two tokens", where=where)
    return parts[0], parts[1]


def _merge_line(pair: tuple[str, str], where: str) -> str:
    left, right = pair
    if " " in left or " " in right:
        raise InputError(f"the merge of {left!r} and {right!r} holds a space", where=where)
    return f"{left} {right}"


def _special_ids(student: Student, config: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    numbers = {token: i for i, token in enumerate(tokens)}
    roles = {"bos": "bos_token", "unknown": "unk_token", "padding": "pad_token", "eos": "eos_token"}
    ids: dict[str, int] = {}
    for role, key in roles.items():
        token = _text(config.get(key))
        if token is None:
            continue
        if token not in numbers:
            raise InputError(
                f"{key} {token!r} is not in the vocabulary",
                where=str(student.path / "tokenizer_config.json"),
            )
        ids[role] = numbers[token]
    ends = _end_ids(student, ids.get("eos"))
    # GGUF has three places; llama.cpp stops at any of them.
    places = ("eos", "eot", "eom")
    if len(ends) > len(places):
        raise InputError(
            f"ends at {len(ends)} different tokens, a GGUF file states at most {len(places)}",
            where=str(student.path / "generation_config.json"),
        )
    if "bos" not in ids and isinstance(student.config.get("bos_token_id"), int):
        ids["bos"] = student.config["bos_token_id"]
    return ids | dict(zip(places, ends, strict=False))


def _end_ids(student: Student, eos: int | None) -> list[int]:
    """Every token that ends a text, the tokenizer's own first."""
    path = student.path / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    stated = generation.get("eos_token_id", student.config.get("eos_token_id"))
    listed = stated if isinstance(stated, list) else [stated]
    return list(dict.fromkeys(i for i in (eos, *listed) if i is not None))


def _adds(student: Student, role: str, token: int | None) -> bool:
    """Whether the tokenizer puts BOS before a text, or EOS behind it, by itself.

    The post-processor decides: beside a ``tokenizer.json``, transformers 5 takes no notice of
    ``add_bos_token`` in ``tokenizer_config.json``.
    """
    from tokenizers import Tokenizer

    if token is None:
        return False
    ids = Tokenizer.from_file(str(student.path / "tokenizer.json")).encode("a").ids
    return bool(ids[0 if role == "bos" else -1] == token)


def _chat_template(student: Student, config: dict[str, Any]) -> str | None:
    path = student.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stated = config.get("chat_template")
    if isinstance(stated, list):
        stated = {entry["name"]: entry["template"] for entry in stated}.get("default")
    return stated if isinstance(stated, str) else None


def _text(token: Any) -> str | None:
    """A special token is written as a string, or as a table with its content."""
    return token.get("content") if isinstance(token, dict) else token
