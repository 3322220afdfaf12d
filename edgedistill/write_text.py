"""Let a student write text by itself, to calibrate on where nobody has text of all that it is for.

Calibrated on one domain, few bits lose the others.  What the student says when nothing is said to
it is of everything that it was trained for (data-free quantization: LLM-QAT, Liu et al. 2023, arXiv
2305.17888), and behind the opening of a conversation it writes the user's part, too (Magpie, Xu et
al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import InputError
from edgedistill.progress import progress_bar
from edgedistill.student import Student
from edgedistill.verify.prompts import read_as_used

AT_ONCE = 32  # sequences whose keys and values lie in memory
MOST_OPENING = 0.5  # of a sequence
_MARK = "edgedistill"  # a word that no template treats in a way of its own


@dataclass(frozen=True)
class WritingSettings:
    """How much is written, and behind what.

    Attributes:
        chat: the fixed part of every conversation.
        tokens: at least so many, in whole sequences.
        sequence_tokens: of each.
        seed: of the sampling.
        threads: of torch.
    """

    chat: Chat = field(default_factory=Chat)
    tokens: int = 32768
    sequence_tokens: int = 512
    seed: int = 0
    threads: int = 2


def write_own_text(student: Path, out: Path, settings: WritingSettings) -> int:
    """Sample sequences at temperature 1 behind where a user's first message begins.

    A turn that ends does not end a sequence: the student writes whatever it thinks comes next.  One
    without a chat template goes on from its beginning-of-sequence token, or from any token.

    Args:
        student: its directory; all weights are held in float32.
        out: a new file of lines with ``rendered``, written aside and renamed.
        settings: of the writing.

    Returns:
        How many sequences were written.

    Raises:
        InputError: the student is unreadable, ``out`` exists, the opening of a conversation takes
            most of a sequence.
        UnavailableError: torch is not installed.
    """
    if out.exists():
        raise InputError("is there already", where=str(out), hint="name a new file")
    length = min(settings.sequence_tokens, Student(student).facts.max_context_tokens)
    tokenizer = load_tokenizer(student)
    used = read_as_used(tokenizer, _MARK, settings.chat, where=str(student))
    opening = used.ids[: used.opening]
    if len(opening) > MOST_OPENING * length:
        raise InputError(
            f"the opening of a conversation takes {len(opening)} of a sequence's {length} tokens",
            where=str(student),
            hint="write longer sequences, or shorten the system message",
        )
    count = math.ceil(settings.tokens / length)
    aside = out.with_name(f"{out.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        for ids in _sequences(student, opening, count, length, settings):
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            file.write(json.dumps({"rendered": text}, ensure_ascii=False) + "\n")
    aside.rename(out)
    return count


def _sequences(
    student: Path, opening: list[int], count: int, length: int, settings: WritingSettings
) -> Iterator[list[int]]:
    """Token ids, the opening among them; the same for the same settings."""
    import torch

    from edgedistill.reference_model import load_reference

    model = load_reference(student, threads=settings.threads)
    vocab_size = Student(student).facts.vocab_size
    with progress_bar(count, "writing") as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for first in range(0, count, AT_ONCE):
            rows = min(AT_ONCE, count - first)
            begun = torch.tensor([opening] * rows, dtype=torch.int64)
            if not opening:
                begun = torch.randint(vocab_size, (rows, 1))
            # Not as an argument: what is None in it, the model's own config would fill in.
            model.generation_config = _sampling(length, begun.shape[1])
            written = model.generate(begun)
            yield from written.tolist()
            bar.advance(rows)


def _sampling(length: int, begun: int) -> Any:
    """Of the model's own distribution, to the full length."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - begun,
        eos_token_id=None,
        pad_token_id=0,
    )
