"""Write a student's tokenizer and configs anew for a part of its vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedistill.bpe_vocabulary import TOKENIZER_FILE, BpeVocabulary
from edgedistill.errors import InputError
from edgedistill.kept_vocabulary import Ids, map_token_ids, names_tokens
from edgedistill.student import read_json, write_json

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
SENTENCEPIECE_FILE = "tokenizer.model"

NewId = Callable[[int], int]


def stated_ids(student: Path) -> frozenset[int]:
    """The token ids that ``config.json`` and ``generation_config.json`` name.

    Raises:
        InputError: one is no JSON.
    """
    found: set[int] = set()
    for name in ("config.json", GENERATION_FILE):
        if (student / name).is_file():
            fields = read_json(student / name)
            found |= {i for key, v in fields.items() if names_tokens(key) for i in _ids(v)}
    return frozenset(found)


def _ids(value: Any) -> list[int]:
    if isinstance(value, list):
        return [i for item in value for i in _ids(item)]
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return [value] if is_id else []


def new_ids(kept: Ids, where: str) -> NewId:
    """From an id of the whole vocabulary to the one in ``kept``.

    Raises:
        InputError: by what is returned, of an id that is not there.
    """
    places = {int(old): new for new, old in enumerate(kept)}

    def new_id(old: int) -> int:
        if old not in places:
            raise InputError(
                f"names the token {old}, which the tokenizer does not have",
                where=where,
                hint="set it to a token of the tokenizer, or to null",
            )
        return places[old]

    return new_id


def write_tokenizer(src: Path, dst: Path, vocabulary: BpeVocabulary, kept: Ids) -> None:
    """Write the tokenizer's files in ``dst`` anew, which holds copies of those in ``src``.

    The chat template and the names of the special tokens stay as they are.  ``tokenizer.model``
    goes: it has the whole vocabulary, and what reads it would find other ids.

    Raises:
        InputError: a file names a token that the tokenizer does not have.
    """
    new_id = new_ids(kept, str(src / TOKENIZER_FILE))
    write_json(dst / TOKENIZER_FILE, _tokenizer(vocabulary, kept, new_id))
    (dst / SENTENCEPIECE_FILE).unlink(missing_ok=True)
    if (src / GENERATION_FILE).is_file():
        fields = map_token_ids(
            read_json(src / GENERATION_FILE), new_ids(kept, str(src / GENERATION_FILE))
        )
        write_json(dst / GENERATION_FILE, fields)
    if (src / TOKENIZER_CONFIG).is_file():
        config = read_json(src / TOKENIZER_CONFIG)
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            config["added_tokens_decoder"] = {str(new_id(int(i))): t for i, t in decoder.items()}
            write_json(dst / TOKENIZER_CONFIG, config)
    if (src / ADDED_FILE).is_file():
        added = read_json(src / ADDED_FILE)
        write_json(dst / ADDED_FILE, {token: new_id(int(i)) for token, i in added.items()})


def _tokenizer(vocabulary: BpeVocabulary, kept: Ids, new_id: NewId) -> dict[str, Any]:
    """``tokenizer.json`` with the kept tokens alone."""
    whole = vocabulary.tokenizer
    stays = {int(i) for i in kept}
    listed = sorted(whole["model"]["vocab"].items(), key=lambda entry: int(entry[1]))
    model = {
        **whole["model"],
        "vocab": {token: new_id(int(i)) for token, i in listed if int(i) in stays},
        "merges": vocabulary.kept_merges(stays),
    }
    changed: dict[str, Any] = {"model": model}
    if whole.get("added_tokens"):
        changed["added_tokens"] = [e | {"id": new_id(int(e["id"]))} for e in whole["added_tokens"]]
    if whole.get("padding"):
        changed["padding"] = whole["padding"] | {"pad_id": new_id(int(whole["padding"]["pad_id"]))}
    if whole.get("post_processor"):
        changed["post_processor"] = _post_processor(whole["post_processor"], new_id)
    return whole | changed


def _post_processor(processor: dict[str, Any], new_id: NewId) -> dict[str, Any]:
    """What puts special tokens around a text names them by id."""
    changed = dict(processor)
    if isinstance(processor.get("processors"), list):
        changed["processors"] = [_post_processor(part, new_id) for part in processor["processors"]]
    if isinstance(processor.get("special_tokens"), dict):  # TemplateProcessing
        changed["special_tokens"] = {
            token: entry | {"ids": [new_id(int(i)) for i in entry["ids"]]}
            for token, entry in processor["special_tokens"].items()
        }
    for role in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if isinstance(processor.get(role), list):
            token, old = processor[role]
            changed[role] = [token, new_id(int(old))]
    return changed
