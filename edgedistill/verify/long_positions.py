"""Does the artifact still see straight near the end of its context?

Wrong RoPE scaling, a window that is ignored or a cache that is too small show after thousands of
tokens only.  One long prompt fills the context to its last token, and stretches of it are held
against the judge; the tokens between them are prefilled without logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgedistill.progress import progress_bar
from edgedistill.results import Check
from edgedistill.session import Agreement, Session
from edgedistill.verify.divergence import kl_divergence, log_softmax
from edgedistill.verify.judge import JudgedStretches

# Between that of a thousand positions, which is 1, and that of a handful, which is 10.
STRETCH_SLACK = 3.0


def check_positions(session: Session, judged: JudgedStretches, agreement: Agreement) -> Check:
    """The worst stretch of a long prompt, in mean KL (nats a token).

    Args:
        session: of the artifact; what it held is forgotten.
        judged: at most as long as the session's context.
        agreement: of the runtime.
    """
    stretches = list(_read(session, judged))
    limit = agreement.kl_mean * STRETCH_SLACK
    means = [float(kl.mean()) for kl in stretches]
    worst = int(np.argmax(np.concatenate(stretches)))
    position = [p for stretch in judged.stretches for p in stretch][worst]
    said = ", ".join(
        f"{mean:.2g} at tokens {s.start} to {s.stop - 1}"
        for mean, s in zip(means, judged.stretches, strict=True)
    )
    return Check(
        name="positions: near the end of the context",
        passed=max(means) <= limit,
        value=max(means),
        limit=limit,
        detail=f"KL, mean {said} of {len(judged.ids)}; "
        f"worst {max(float(kl.max()) for kl in stretches):.2g} at token {position}",
    )


def _read(session: Session, judged: JudgedStretches) -> Iterator[npt.NDArray[np.float64]]:
    """KL(judge || artifact) of each stretch: float64 [positions]."""
    session.reset()
    with progress_bar(len(judged.ids), "verifying long positions") as bar:
        for number, stretch in enumerate(judged.stretches):
            before = session.position
            if stretch.start > before:
                session.prefill(judged.ids[before : stretch.start])
            streamed = session.stream_logits(judged.ids[stretch.start : stretch.stop])
            log_probs = np.concatenate([log_softmax(logits) for logits in streamed])
            bar.advance(session.position - before)
            yield kl_divergence(judged.of(number), log_probs)
