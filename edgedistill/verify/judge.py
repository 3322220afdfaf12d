"""The judge: ``transformers`` in float32 reads the texts, its log-probabilities are kept on disk.

The judge shares no code with exporters, runtimes or ``decoder.py``.
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


def write_judge_logits(student: Path, texts: Mapping[str, str], dst: Path, *, threads: int) -> None:
    """Write the judge's log-probabilities on the first tokens of each text.

    Args:
        student: a student directory; a quantized one is dequantized for ``transformers``.
        texts: name -> text.
        dst: receives ``ids.json`` and one float32 ``<text>.npy`` [tokens, vocab] each.
        threads: for torch.
    """
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    limit = min(TOKENS_PER_TEXT, Student(student).facts.max_context_tokens)
    tokenizer = AutoTokenizer.from_pretrained(str(student))
    ids = {n: tokenizer(t, add_special_tokens=False).input_ids[:limit] for n, t in texts.items()}
    with open_judge(student) as model:
        for name, tokens in ids.items():
            if not tokens:
                raise InputError(f"the text {name!r} has no tokens", where=str(student))
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0].double()
                log_probs = torch.log_softmax(logits, dim=-1).float().numpy()
            np.save(dst / f"{name}.npy", log_probs)
    write_json(dst / IDS_FILE, ids)


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
