"""A tiny tokenizer of Gemma's kind: SentencePiece's BPE with byte fallback, in ``tokenizers``."""

from __future__ import annotations

from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("\n", "\n\n", "  ", "   ", "<b>")
SPACE = "▁"


def write_sentencepiece(directory: Path, corpus: list[str], vocab_size: int) -> None:
    """Write ``tokenizer.json``: special tokens, user-defined ones, bytes, pieces, characters.

    As in SentencePiece every way to cut a piece in two pieces makes it, and its rank alone counts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    first = [*SPECIAL, *USER_DEFINED, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = _pieces(corpus, vocab_size - len(first))
    tokens = [*first, *pieces]
    tokens += [f"<|unused_{i}|>" for i in range(vocab_size - len(tokens))]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([t for t in tokens if t in SPECIAL or t.startswith("<|unused")])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED])
    tokenizer.save(str(directory / "tokenizer.json"))


def _pieces(corpus: list[str], count: int) -> list[str]:
    """Pieces of several characters in the order of their rank, then the characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=count, limit_alphabet=count // 2, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    ranked = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in ranked if "\n" not in token]
    return sorted(tokens, key=lambda token: len(token) == 1)
