"""The judge: ``transformers`` in float32 reads the texts, its log-probabilities are kept on disk.

The judge shares no code with exporters, runtimes or ``decoder.py``.

A text is read as the model is used: as the user's message of a conversation.  A model that meets a
text without the beginning that it was trained with may be unstable by itself: on SmolLM2-135M a
second word can come half-way to being an attention sink, as the first one is (Xiao et al. 2023,
arXiv 2309.17453), and noise of 1 % on the embeddings then moves that position by 0.08 nats, which
is some hundred times the mean.  Such a position says nothing of an artifact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.student import Student, dequantize_student, read_json, write_json

TOKENS_PER_TEXT = 400
IDS_FILE = "ids.json"


@dataclass(frozen=True)
class JudgedText:
    """A text as the judge saw it.

    Attributes:
        name: of the text.
        ids: the student's own token ids.
        log_probs: float32 [tokens, vocab], memory-mapped; row i predicts token i + 1.
    """

    name: str
    ids: list[int]
    log_probs: npt.NDArray[np.float32]


def write_judge_logits(
    student: Path, texts: Mapping[str, str], dst: Path, *, chat: Chat, threads: int
) -> None:
    """Write the judge's log-probabilities on the first tokens of each text.

    Args:
        student: a student directory; a quantized one is dequantized for ``transformers``.
        texts: name -> text.
        dst: receives ``ids.json`` and one float32 ``<text>.npy`` [tokens, vocab] each.
        chat: the fixed part of the conversation that the texts are put into.
        threads: for torch.

    Raises:
        InputError: a text without tokens; a chat template that refuses it.
    """
    import torch

    torch.set_num_threads(threads)
    longest = Student(student).facts.max_context_tokens
    ids = {name: _ids_as_used(student, text, chat)[:longest] for name, text in texts.items()}
    with open_judge(student) as model:
        for name, tokens in ids.items():
            if not tokens:
                raise InputError(f"the text {name!r} has no tokens", where=str(student))
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0].double()
                log_probs = torch.log_softmax(logits, dim=-1).float().numpy()
            np.save(dst / f"{name}.npy", log_probs)
    write_json(dst / IDS_FILE, ids)


def _ids_as_used(student: Path, text: str, chat: Chat) -> list[int]:
    """What the model reads before ``text``, and the text's first ``TOKENS_PER_TEXT`` tokens.

    Without a chat template that is the beginning-of-sequence token, if the tokenizer has one.
    """
    tokenizer = load_tokenizer(student)
    if tokenizer.chat_template:
        content = text.strip()
        message = {"role": "user", "content": content}
        whole = render_conversation(tokenizer, [message], chat, where=str(student))
        before = whole[: max(0, whole.find(content))]
    else:
        before = tokenizer.bos_token or ""
        whole = before + text
    opening = len(tokenizer(before, add_special_tokens=False).input_ids)
    ids: list[int] = tokenizer(whole, add_special_tokens=False).input_ids
    return ids[: opening + TOKENS_PER_TEXT]


def read_judge_logits(directory: Path) -> list[JudgedText]:
    """What :func:`write_judge_logits` wrote, log-probabilities memory-mapped."""
    ids = read_json(directory / IDS_FILE)
    return [
        JudgedText(name, tokens, np.load(directory / f"{name}.npy", mmap_mode="r"))
        for name, tokens in ids.items()
    ]


@contextmanager
def open_judge(student: Path) -> Iterator[Any]:
    """The student as a ``transformers`` model in float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        path = student
        if Student(student).is_quantized:
            path = Path(scratch)
            dequantize_student(student, path)
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        yield model.eval()
