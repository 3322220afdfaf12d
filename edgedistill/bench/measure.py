"""The measurement itself, in a process of its own: ``python -m edgedistill.bench.measure JOB OUT``.

A process of its own holds nothing but the runtime and the model, so its peak memory is theirs, and
no other threads stand in the way of the clock.
"""

from __future__ import annotations

import gc
import re
import resource
import sys
import time
from pathlib import Path

from edgedistill.bench.prompt import Prompter, UserPrompt
from edgedistill.errors import EdgedistillError
from edgedistill.plugins import load_runtime
from edgedistill.results import Document
from edgedistill.session import Runtime, Session

WARM_UPS = 1
COLD_REPEATS = 3
ANSWER_TOKENS = 16  # within which an answer should show something


class Job(Document):
    """What to measure.

    Attributes:
        repeats: prompt length in tokens -> number of measured requests.
        decode_tokens: generated after each prompt, greedily, whether or not the model would stop.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.
    """

    artifact: Path
    runtime: str
    student: Path
    threads: int
    context_tokens: int
    repeats: dict[int, int]
    decode_tokens: int
    kv_cache_bits: int | None = None


class Request(Document):
    """One request: a prompt of known length, then decoding."""

    ttft_ms: float
    decode_tok_per_s: float


class Measured(Document):
    """What came out, by prompt length; times in milliseconds.

    Attributes:
        user_prompt_tokens: exact lengths of the prompts that were timed from text.
        ttft_user_ms: empty when the model shows nothing; ``ttft_cold_ms`` likewise.
        baseline_rss_bytes: held before the artifact was opened.
    """

    requests: dict[int, list[Request]]
    user_prompt_tokens: dict[int, int]
    ttft_user_ms: dict[int, list[float]]
    ttft_cold_ms: list[float]
    cpu_seconds: float
    wall_seconds: float
    baseline_rss_bytes: int
    peak_rss_bytes: int
    settings: dict[str, str]


class Failure(Document):
    """An error that the parent process raises again."""

    kind: str
    message: str
    where: str | None
    hint: str | None


def measure(job: Job) -> Measured:
    """Run all requests of a job in this process.

    Raises:
        EdgedistillError: the runtime cannot open the artifact, or the student has no tokenizer.
    """
    runtime, prompter = load_runtime(job.runtime, job.kv_cache_bits), Prompter(job.student)
    baseline = _peak_rss_bytes()
    gc.disable()
    requests: dict[int, list[Request]] = {}
    with _open(runtime, job) as session:
        cpu = wall = 0.0
        for length, repeats in job.repeats.items():
            ids = prompter.exact_ids(length)
            for _ in range(WARM_UPS):
                _request(session, ids, job.decode_tokens)
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            requests[length] = [_request(session, ids, job.decode_tokens) for _ in range(repeats)]
            cpu += time.process_time() - cpu_start
            wall += time.perf_counter() - wall_start
        prompts = {n: p for n in job.repeats if (p := prompter.user_prompt(n)) is not None}
        user = {n: _user_times(session, prompter, p, job.repeats[n]) for n, p in prompts.items()}
        peak = _peak_rss_bytes()
    return Measured(
        requests=requests,
        user_prompt_tokens={n: prompt.tokens for n, prompt in prompts.items()},
        ttft_user_ms={n: times for n, times in user.items() if times},
        ttft_cold_ms=_cold_times(runtime, job, prompter, prompts),
        cpu_seconds=cpu,
        wall_seconds=wall,
        baseline_rss_bytes=baseline,
        peak_rss_bytes=peak,
        settings=runtime.settings(),
    )


def _open(runtime: Runtime, job: Job) -> Session:
    return runtime.open(job.artifact, context_tokens=job.context_tokens, threads=job.threads)


def _request(session: Session, ids: list[int], decode_tokens: int) -> Request:
    """Prefill, then decode greedily; the session starts empty."""
    session.reset()
    start = time.perf_counter()
    token = int(session.prefill(ids).argmax())
    first = last = time.perf_counter()
    for _ in range(decode_tokens - 1):
        token = int(session.step(token).argmax())
        last = time.perf_counter()
    rate = (decode_tokens - 1) / (last - first)
    return Request(ttft_ms=1e3 * (first - start), decode_tok_per_s=rate)


def _user_times(
    session: Session, prompter: Prompter, prompt: UserPrompt, repeats: int
) -> list[float]:
    """Milliseconds from text to first visible text; empty when the model shows none."""
    times: list[float] = []
    for repeat in range(WARM_UPS + repeats):
        session.reset()
        start = time.perf_counter()
        if not _answers(session, prompter, prompt.text):
            return []
        if repeat >= WARM_UPS:
            times.append(1e3 * (time.perf_counter() - start))
    return times


def _cold_times(
    runtime: Runtime, job: Job, prompter: Prompter, prompts: dict[int, UserPrompt]
) -> list[float]:
    """The shortest prompt with the load of the artifact, whose file is in the page cache."""
    if not prompts:
        return []
    prompt, times = prompts[min(prompts)], []
    for _ in range(COLD_REPEATS):
        start = time.perf_counter()
        with _open(runtime, job) as session:
            if not _answers(session, prompter, prompt.text):
                return []
            times.append(1e3 * (time.perf_counter() - start))
    return times


def _answers(session: Session, prompter: Prompter, text: str) -> bool:
    """Template, tokens, prefill, and steps until something can be read."""
    prompt = prompter.render(text)
    ids = session.tokenize(prompt)
    logits = session.prefill(prompter.encode(prompt) if ids is None else ids)
    answer = [int(logits.argmax())]
    while not prompter.is_visible(answer):
        if len(answer) == ANSWER_TOKENS:
            return False
        answer.append(int(session.step(answer[-1]).argmax()))
    return True


def _peak_rss_bytes() -> int:
    """The most memory that this process has held at once.

    ``VmHWM`` and not ``ru_maxrss``: the latter survives ``exec`` and would count the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str]) -> int:
    """Read a job from the first file, write a result or a failure to the second."""
    job_file, out_file = (Path(argument) for argument in arguments)
    try:
        outcome: Document = measure(Job.model_validate_json(job_file.read_text()))
    except EdgedistillError as error:
        outcome = Failure(
            kind=type(error).__name__, message=error.message, where=error.where, hint=error.hint
        )
    except KeyboardInterrupt:
        return 130
    out_file.write_text(outcome.model_dump_json())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
