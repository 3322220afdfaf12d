"""The tokenizer of a GGUF file, rebuilt for ``tokenizers`` and ``transformers``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgedistill.errors import InputError
from edgedistill.gguf_pretokenizers import PreTokenizer, pre_tokenizer_named
from edgedistill.gguf_sentencepiece import merge_pairs, refuse_pieces, sentencepiece_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token types of tokenizer.ggml.token_type, from the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# tokenizer.ggml.model: byte-level BPE, and BPE with byte fallback as of SentencePiece.
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
KNOWN_TYPES = {
    BYTE_LEVEL: (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED),
    SENTENCEPIECE: (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE),
}


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that GGUF metadata describe.

    Returns:
        a ``tokenizers.Tokenizer`` that gives the ids which llama.cpp gives on the same file.

    Raises:
        InputError: another kind of tokenizer, an unknown pre-tokenizer, or damaged lists.
    """
    pre = check_tokenizer_kind(metadata, where)
    tokens, types = _tokens_and_types(metadata, where)
    if pre is None:
        tokenizer = _with_byte_fallback(metadata, tokens, types, where)
    else:
        tokenizer = _byte_level(metadata, tokens, pre, where)
    _add_special(tokenizer, tokens, types)
    _set_post_processor(tokenizer, metadata, tokens, adds_bos(metadata, where))
    return tokenizer


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], pre: PreTokenizer, where: str
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(metadata, vocab, where)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = _from_structure(pre.structure)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_byte_fallback(
    metadata: dict[str, Any], tokens: list[str], types: list[int], where: str
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError("has no tokenizer.ggml.scores, or not one for each token", where=where)
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise InputError("has scores of tokens that are no numbers", where=where)
    refuse_pieces(tokens, where)
    # llama.cpp finds special tokens in the text; all others it merges, whatever their type.
    made = [kind not in (CONTROL, UNKNOWN, USER_DEFINED) for kind in types]
    unknown = special_id(metadata, "unknown")
    return sentencepiece_tokenizer(
        tokens, merge_pairs(tokens, scores, made), None if unknown is None else tokens[unknown]
    )


def check_tokenizer_kind(metadata: dict[str, Any], where: str) -> PreTokenizer | None:
    """The pre-tokenizer of a file whose tokenizer is known here; None where there is none.

    Raises:
        InputError: it is neither byte-level BPE with a pre-tokenizer that is known, nor BPE with
            byte fallback that leaves the beginning of a text as it is.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == BYTE_LEVEL:
        return pre_tokenizer_named(metadata.get("tokenizer.ggml.pre"), where)
    if kind != SENTENCEPIECE:
        raise InputError(
            f"tokenizer.ggml.model is {kind!r}; byte-level BPE ('gpt2') and BPE with byte fallback "
            "('llama') are read",
            where=where,
            hint="start from the model's Hugging Face directory",
        )
    # llama.cpp puts a space before a text where the file does not say otherwise.
    if metadata.get("tokenizer.ggml.add_space_prefix") is not False:
        raise InputError(
            "its tokenizer puts a space before a text, which is not read yet",
            where=where,
            hint="start from the model's Hugging Face directory",
        )
    return None


def adds_bos(metadata: dict[str, Any], where: str) -> bool:
    """Whether llama.cpp puts BOS before a text by itself."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    if metadata.get("tokenizer.ggml.model") == SENTENCEPIECE:
        return True
    return pre_tokenizer_named(metadata.get("tokenizer.ggml.pre"), where).adds_bos


def special_id(metadata: dict[str, Any], role: str) -> int | None:
    """The id of ``bos``, ``eos``, ``eot``, ``eom``, ``unknown`` or ``padding``, if it is stated."""
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    return value if isinstance(value, int) and 0 <= value < count else None


def _tokens_and_types(metadata: dict[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens, types = (metadata.get(f"tokenizer.ggml.{k}") for k in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        raise InputError("has no tokens, or not one type for each", where=where)
    if not all(isinstance(token, str) for token in tokens):
        raise InputError("lists tokens that are not text", where=where)
    if len(set(tokens)) != len(tokens):
        raise InputError("lists a token twice", where=where)
    kind = str(metadata["tokenizer.ggml.model"])  # it was checked
    strange = sorted(set(types) - set(KNOWN_TYPES[kind]))
    if strange:
        raise InputError(f"has tokens of the type {strange[0]}, unknown to BPE", where=where)
    return tokens, types


def _merges(metadata: dict[str, Any], vocab: dict[str, int], where: str) -> list[tuple[str, str]]:
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise InputError("has no tokenizer.ggml.merges", where=where)
    merges = []
    for line in lines:
        left, _, right = str(line).partition(" ")
        if not all(part in vocab for part in (left, right, left + right)):
            raise InputError(f"the merge {line!r} is not made of its tokens", where=where)
        merges.append((left, right))
    return merges


def _from_structure(structure: dict[str, Any]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    kind = structure["type"]
    if kind == "Sequence":
        return pre_tokenizers.Sequence([_from_structure(s) for s in structure["pretokenizers"]])
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=structure["individual_digits"])
    if kind == "Split":
        pattern = Regex(structure["pattern"]["Regex"])
        return pre_tokenizers.Split(pattern, behavior="isolated", invert=structure["invert"])
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=structure["use_regex"])


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    # One call in the order of the ids: they keep the ids that they have in the vocabulary.
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _set_post_processor(
    tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], add_bos: bool
) -> None:
    from tokenizers import processors

    bos, eos = (special_id(metadata, role) for role in ("bos", "eos"))
    around = {
        "before": bos if add_bos else None,
        "after": eos if metadata.get("tokenizer.ggml.add_eos_token") else None,
    }
    used = {role: (tokens[i], i) for role, i in around.items() if i is not None}
    if not used:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    before = [used["before"][0]] if "before" in used else []
    after = [used["after"][0]] if "after" in used else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *(f"{t}:1" for t in before),
            "$B:1",
            *(f"{t}:1" for t in after),
        ],
        special_tokens=sorted(set(used.values())),
    )
