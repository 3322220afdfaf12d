"""Structure and rounding told apart, for a file of another quantization than the student's.

*Does the file compute what its own weights say, under the reference's config?*  RoPE, norms, row
order and tokens are structure; nothing excuses a difference.  *How far are its weights from the
reference's?*  That is rounding: it is measured, and held to what rounding to that width is known
to cost at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgedistill.results import Check, TextDivergence
from edgedistill.session import Agreement, Runtime
from edgedistill.verify.divergence import kl_divergence
from edgedistill.verify.judge import JudgedText, read_judge_logits
from edgedistill.verify.own_weights import FLOATS, LOSS_FILE, WeightLoss
from edgedistill.verify.rounding import fit_agreement
from edgedistill.verify.stated import Stated

# What rounding alone may cost: bits per weight -> mean KL to the reference, in nats a token.
# Two to three times what llama.cpp's own types cost SmolLM2-135M with weights that lie on no grid:
# Q8_0 .006, Q4_K_M .064 (6.3 bits on its shapes), Q4_0 .42.  Larger models lose less.
LIMITS = ((15.0, 5e-3), (7.5, 0.03), (6.0, 0.15), (4.0, 1.0), (3.0, 3.0))
# A file whose logits are this near is the same function, however its weights are scaled.
SAME_FUNCTION = 0.02
FLOAT_KL, LEAST_TOP1 = 1e-3, 0.9
# Rounding to 2 bits leaves a correlation of .9; a permuted or swapped matrix has none.
LEAST_CORRELATION = 0.5
# Vectors are not quantized; bfloat16 moves them by 0.4 %.
LARGEST_VECTOR_ERROR = 0.01
ROWS = 64


@dataclass(frozen=True)
class Judges:
    """What a file is held against.

    Attributes:
        student: the reference's directory.
        reference: ``transformers`` float32 on the reference.
        own: on the file's own weights under the reference's config; None where they cannot be read.
        loss: the file's weights against the reference's.
        own_judge: directory of ``own``, with what rounding costs that model.
    """

    student: Path
    reference: list[JudgedText]
    own: list[JudgedText] | None = None
    loss: WeightLoss | None = None
    own_judge: Path | None = None

    @classmethod
    def read(cls, student: Path, reference: Path, own: Path | None, weights: Path | None) -> Judges:
        """From the outputs of the steps that made them."""
        loss = None
        if weights is not None:
            loss = WeightLoss.model_validate_json((weights / LOSS_FILE).read_bytes())
        judged = read_judge_logits(own) if own is not None else None
        return cls(student, read_judge_logits(reference), judged, loss, own)

    @property
    def rounding_loss(self) -> float | None:
        """Mean KL(reference || own weights), both in float32: rounding, without any runtime."""
        if self.own is None:
            return None
        found = []
        for mine, theirs in zip(self.own, self.reference, strict=True):
            for start in range(0, len(mine.ids), ROWS):
                rows = slice(start, start + ROWS)
                log_probs = mine.log_probs[rows].astype(np.float64)
                found.append(kl_divergence(theirs.log_probs[rows], log_probs))
        return float(np.concatenate(found).mean())


def check_structure(own: list[TextDivergence], judges: Judges, runtime: Runtime) -> list[Check]:
    """The file's logits against its own weights; no check where those could not be read."""
    if not own or judges.own_judge is None:
        return []
    tensors = judges.loss.tensors.values() if judges.loss else ()
    quantized = any(tensor.stored not in FLOATS for tensor in tensors)
    of_runtime = runtime.quantized_agreement if quantized else Agreement(FLOAT_KL, LEAST_TOP1)
    agreement = fit_agreement(of_runtime, judges.own_judge)
    least_top1 = min(LEAST_TOP1, agreement.top1)
    kl, top1 = mean(own, "kl_mean"), mean(own, "top1")
    return [
        Check(
            name="logits: as its weights",
            passed=kl <= agreement.kl_mean,
            value=kl,
            limit=agreement.kl_mean,
            detail=f"KL to its own weights under the reference's config; {_worst(own)}",
        ),
        Check(
            name="logits: top-1 as its weights",
            passed=top1 >= least_top1,
            value=top1,
            limit=least_top1,
            detail="share of positions with the most probable token of its own weights",
        ),
    ]


def check_weights(loss: WeightLoss, total: float) -> list[Check]:
    """Matrices are like the reference's, vectors are the reference's.

    Args:
        loss: tensor by tensor.
        total: mean KL of the file to the reference; a file that is the same function may have its
            scales moved from one tensor to another, as AWQ does.
    """
    same = total <= SAME_FUNCTION
    vectors = {n: t for n, t in loss.tensors.items() if "norm" in n or n.endswith(".bias")}
    matrices = {n: t for n, t in loss.tensors.items() if n not in vectors}
    name, least = min(matrices.items(), key=lambda item: item[1].correlation)
    checks = [
        Check(
            name="weights: like the reference's",
            passed=bool(least.correlation >= LEAST_CORRELATION or same),
            value=least.correlation,
            limit=LEAST_CORRELATION,
            detail=f"least correlation of a matrix, {name} ({least.stored})",
        )
    ]
    if vectors:
        name, most = max(vectors.items(), key=lambda item: item[1].relative_error)
        checks.append(
            Check(
                name="weights: norms and biases",
                passed=bool(most.relative_error <= LARGEST_VECTOR_ERROR or same),
                value=most.relative_error,
                limit=LARGEST_VECTOR_ERROR,
                detail=f"largest relative error of a vector, {name} ({most.stored})",
            )
        )
    return checks


def check_loss(reference: list[TextDivergence], judges: Judges, stated: Stated) -> Check:
    """How far the file is from the reference, and how much of that is rounding."""
    total, bits = mean(reference, "kl_mean"), _width(judges, stated)
    limit = next((kl for width, kl in LIMITS if bits is not None and bits >= width), None)
    detail = f"KL; top-1 {mean(reference, 'top1'):.1%}; {_worst(reference)}"
    if bits is not None:
        detail = f"{bits:.3g} bits per weight; {detail}"
    if judges.rounding_loss is not None:
        detail += f"; rounding its weights alone costs {judges.rounding_loss:.2g}"
    return Check(
        name="loss: KL to the reference",
        passed=bool(np.isfinite(total) and (limit is None or total <= limit)),
        value=total,
        limit=limit,
        detail=detail,
    )


def mean(texts: list[TextDivergence], figure: str) -> float:
    """A figure over all tokens of all texts."""
    tokens = sum(t.tokens for t in texts)
    return sum(float(getattr(t, figure)) * t.tokens for t in texts) / tokens


def _width(judges: Judges, stated: Stated) -> float | None:
    """Bits per weight, of a GGUF as a whole; else the narrowest codes; 16 and more without any."""
    if judges.loss is not None:
        return judges.loss.bits_per_weight
    if not stated.storage:
        return None
    matches = (re.match(r"int(\d+) ", kind) for kind in stated.storage.values())
    return float(min((int(match[1]) for match in matches if match), default=16))


def _worst(texts: list[TextDivergence]) -> str:
    worst = max(texts, key=lambda t: t.kl_max)
    return f"worst {worst.kl_max:.2g} in {worst.text!r} at token {worst.worst_position}"
