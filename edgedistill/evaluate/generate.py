"""Let a session answer in the model's own words: greedily, to the end of its turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import StageError
from edgedistill.evaluate.prompts import Prompt
from edgedistill.evaluate.suite import GenerateCase
from edgedistill.progress import progress_bar
from edgedistill.session import Logits, Session
from edgedistill.student import read_json
from edgedistill.verify.prompts import common_prefix

# A word that no template treats in a way of its own.
_MARK = "edgedistill"


@dataclass(frozen=True)
class Voice:
    """What turns generated ids into an answer.

    Attributes:
        tokenizer: of ``transformers``.
        end_ids: at any of which the answer ends.
    """

    tokenizer: Any
    end_ids: frozenset[int]

    @classmethod
    def of(cls, student: Path, chat: Chat) -> Voice:
        """The student's own tokenizer, the ends that its configs state and that its template uses.

        Raises:
            InputError: there is no tokenizer, or a config is damaged.
        """
        tokenizer = load_tokenizer(student)
        ends = _stated_ends(student) | _template_ends(tokenizer, chat)
        if tokenizer.eos_token_id is not None:
            ends |= {int(tokenizer.eos_token_id)}
        return cls(tokenizer, frozenset(ends))

    def text(self, ids: Sequence[int]) -> str:
        """What the ids say, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _stated_ends(student: Path) -> set[int]:
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (student / name).is_file():
            stated = read_json(student / name).get("eos_token_id")
            listed = stated if isinstance(stated, list) else [stated]
            found |= {token for token in listed if isinstance(token, int)}
    return found


def _template_ends(tokenizer: Any, chat: Chat) -> set[int]:
    """The special token that the template puts behind an answer, if it does."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return set()
    turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **chat.template_args))
    except TemplateError:  # it wants another beginning; the ends that the configs state remain
        return set()
    behind = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"][:1]
    special = tokenizer.added_tokens_decoder
    return {token for token in behind if token in special and special[token].special}


def generate_answers(
    session: Session, cases: Mapping[str, GenerateCase], prompts: Sequence[Prompt], voice: Voice
) -> dict[str, str]:
    """Case id -> the greedy answer; what neighbouring prompts share is computed once.

    An answer ends before an end token or a stop text, or at ``max_tokens``.  Of equally probable
    tokens the first is taken.

    Raises:
        StageError: the logits are not finite.
    """
    answers: dict[str, str] = {}
    cached: tuple[int, ...] = ()
    session.reset()
    with progress_bar(len(prompts), "answering") as bar:
        for prompt in sorted(prompts, key=lambda prompt: prompt.ids):
            # One id is always computed: its logits give the first token.
            keep = min(common_prefix(cached, prompt.ids), len(prompt.ids) - 1)
            session.rewind(keep)
            logits = session.prefill(prompt.ids[keep:])
            cached = prompt.ids
            case = cases[prompt.id]
            answers[prompt.id] = write_answer(
                session, logits, voice, max_tokens=case.max_tokens, stop=case.stop, name=case.id
            )
            bar.advance()
    return answers


def write_answer(
    session: Session,
    logits: Logits,
    voice: Voice,
    *,
    max_tokens: int,
    stop: Sequence[str],
    name: str,
) -> str:
    """The greedy answer after a prompt with which the session's cache ends.

    Args:
        session: which the answer's tokens are appended to.
        logits: after the prompt, float32 [vocab].
        voice: where answers end.
        max_tokens: of the answer.
        stop: texts that end it.
        name: of the case, for errors.

    Raises:
        StageError: the logits are not finite.
    """
    ids: list[int] = []
    while True:
        if not np.isfinite(logits.max()):
            raise StageError(
                f"the logits of case {name} are not finite after {len(ids)} tokens",
                hint="the artifact overflows or is damaged; verify shows where it departs",
            )
        token = int(logits.argmax())
        if token in voice.end_ids:
            return voice.text(ids)
        ids.append(token)
        if stop:
            text = voice.text(ids)
            cuts = [text.find(end) for end in stop if end in text]
            if cuts:
                return text[: min(cuts)]
        if len(ids) == max_tokens:
            return voice.text(ids)
        logits = session.step(token)
