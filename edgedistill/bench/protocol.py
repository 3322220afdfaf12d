"""The benchmark of one artifact on this machine, by the definitions of MLPerf Client.

``ttft_model_ms`` runs from token ids to the first token, ``ttft_user_ms`` from text to the first
visible text, ``ttft_cold_ms`` is the latter with the load of the artifact; ``decode_tok_per_s`` is
(n - 1) / (t_last - t_first).  Source: https://github.com/mlcommons/mlperf_client, "Metrics".
What is measured how stands in docs/benchmarks.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedistill import errors
from edgedistill.bench.machine import describe_machine, load_average
from edgedistill.bench.measure import ANSWER_TOKENS, WARM_UPS, Failure, Job, Measured
from edgedistill.bench.roofline import (
    bytes_per_token,
    decode_roofline_share,
    read_bandwidth_gb_per_s,
)
from edgedistill.plugins import load_plugin
from edgedistill.progress import track
from edgedistill.results import Bench, Timing
from edgedistill.student import Student

REPEATS = {64: 5, 512: 3}  # prompt tokens -> measured requests
DECODE_TOKENS = 64
ATTEMPTS = 3
MIN_CPU_SHARE = 0.9
HOPELESS_CPU_SHARE = 0.5  # below it the machine will not be quiet in a minute: do not try again
MAX_SPREAD = 0.10


def can_bench(runtime: str) -> str | None:
    """Why a runtime's speed says nothing about a device; None when it does.

    Raises:
        UsageError: there is no such runtime.
    """
    return load_plugin("runtimes", runtime).limitation


def bench_artifact(
    artifact: Path,
    runtime: str,
    *,
    student: Path,
    threads: int,
    context_tokens: int,
    weight_bytes: int,
    kv_cache_bits: int | None = None,
) -> Bench:
    """Measure an artifact in a process of its own, again when the machine was too busy.

    The first of ``ATTEMPTS`` attempts that is accepted counts, else the last one, which is marked.
    A machine that gives less than ``HOPELESS_CPU_SHARE`` is not asked again.

    Args:
        artifact: its directory.
        runtime: by its file name in ``runtimes/``.
        student: the rung's student directory: tokenizer, chat template, shapes and grids.
        threads: that the runtime and the bandwidth test use.
        context_tokens: what the artifact claims; prompts are cut to what fits.
        weight_bytes: of all weight data in the artifact, as its exporter counts them.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.

    Raises:
        UsageError: the runtime is no measure of a device's speed.
        InputError: the artifact or the student cannot be read.
        UnavailableError: the runtime is not installed.
        StageError: the measuring process died.
    """
    limitation = can_bench(runtime)
    if limitation is not None:
        raise errors.UsageError(f"{runtime} cannot be benchmarked: {limitation}")
    job = plan_job(artifact, runtime, student, threads, context_tokens)
    job = job.model_copy(update={"kv_cache_bits": kv_cache_bits})
    opened = Student(student)
    depth = min(job.repeats) + job.decode_tokens // 2
    read_bytes = bytes_per_token(
        opened.facts, opened.grids, weight_bytes, depth, kv_cache_bits=kv_cache_bits or 16
    )
    for attempt in track(range(1, ATTEMPTS + 1), label=f"bench {artifact.name}"):
        load = load_average()
        bandwidth = read_bandwidth_gb_per_s(threads)
        extra = {"load_average_before": f"{load:.2f}", "attempt": f"{attempt} of {ATTEMPTS}"}
        bench = summarize(job, _run(job), bandwidth, read_bytes, extra)
        if bench.accepted or bench.cpu_share < HOPELESS_CPU_SHARE:
            break
    return bench


def plan_job(artifact: Path, runtime: str, student: Path, threads: int, context_tokens: int) -> Job:
    """The prompt lengths and repeats that fit into the context.

    Raises:
        UsageError: the context is too short for any request.
    """
    decode = min(DECODE_TOKENS, context_tokens // 2)
    room = context_tokens - max(decode, ANSWER_TOKENS)
    if decode < 2 or room < 1:
        raise errors.UsageError(f"a context of {context_tokens} tokens is too short to benchmark")
    repeats: dict[int, int] = {}
    for length, count in REPEATS.items():
        repeats.setdefault(min(length, room), count)
    return Job(
        artifact=artifact.absolute(),
        runtime=runtime,
        student=student.absolute(),
        threads=threads,
        context_tokens=context_tokens,
        repeats=repeats,
        decode_tokens=decode,
    )


def summarize(
    job: Job,
    measured: Measured,
    bandwidth_gb_per_s: float,
    read_bytes: int,
    extra_settings: Mapping[str, str],
) -> Bench:
    """Percentiles, roofline and the verdict on the run, from raw times."""
    ttft = {n: [r.ttft_ms for r in rs] for n, rs in measured.requests.items()}
    decode = {n: [r.decode_tok_per_s for r in rs] for n, rs in measured.requests.items()}
    shortest = float(np.median(decode[min(decode)]))
    share = decode_roofline_share(shortest, bandwidth_gb_per_s, read_bytes)
    cpu_share = measured.cpu_seconds / (measured.wall_seconds * job.threads)
    why_not = objections(ttft, decode, cpu_share, share)
    machine = describe_machine()
    return Bench(
        device=f"{machine['cpu']}, {machine['cores']} cores",
        runtime=job.runtime,
        threads=job.threads,
        ttft_model_ms={n: timing(times) for n, times in ttft.items()},
        ttft_user_ms={n: timing(times) for n, times in measured.ttft_user_ms.items()},
        ttft_cold_ms=timing(measured.ttft_cold_ms) if measured.ttft_cold_ms else None,
        prefill_tok_per_s={n: rate_timing([1e3 * n / t for t in ts]) for n, ts in ttft.items()},
        decode_tok_per_s={n: rate_timing(rates) for n, rates in decode.items()},
        memory_bandwidth_gb_per_s=bandwidth_gb_per_s,
        decode_roofline_share=share,
        peak_rss_bytes=measured.peak_rss_bytes,
        cpu_share=cpu_share,
        accepted=not why_not,
        reason="; ".join(why_not),
        settings={
            **measured.settings,
            **extra_settings,
            "warm_ups": str(WARM_UPS),
            "decode_tokens": str(job.decode_tokens),
            "user_prompt_tokens": " ".join(map(str, measured.user_prompt_tokens.values())),
            "baseline_rss_bytes": str(measured.baseline_rss_bytes),
            "bytes_per_token": str(read_bytes),
        },
    )


def timing(times: Sequence[float]) -> Timing:
    """Percentiles by linear interpolation; of few repeats p95 is close to the slowest."""
    p50, p95 = (float(p) for p in np.percentile(times, [50, 95]))
    return Timing(p50=p50, p95=p95, raw=list(times))


def rate_timing(rates: Sequence[float]) -> Timing:
    """As :func:`timing`, with the slow tail on the other side: p95 is what 95% of runs reach."""
    p50, p95 = (float(p) for p in np.percentile(rates, [50, 5]))
    return Timing(p50=p50, p95=p95, raw=list(rates))


def objections(
    ttft_ms: Mapping[int, Sequence[float]],
    decode_tok_per_s: Mapping[int, Sequence[float]],
    cpu_share: float,
    roofline_share: float,
) -> list[str]:
    """Why a run cannot be trusted; empty when it can."""
    found = []
    if cpu_share < MIN_CPU_SHARE:
        found.append(
            f"the machine was busy: the run got {cpu_share:.0%} of its threads' CPU time, "
            f"and needs {MIN_CPU_SHARE:.0%}"
        )
    for name, table in (("TTFT", ttft_ms), ("decode rate", decode_tok_per_s)):
        for length, values in table.items():
            spread = (max(values) - min(values)) / float(np.median(values))
            if spread > MAX_SPREAD:
                found.append(
                    f"{name} after {length} tokens varied by {spread:.0%} between repeats, "
                    f"more than {MAX_SPREAD:.0%}"
                )
    if roofline_share > 1:
        found.append(
            f"decoding at {roofline_share:.0%} of what memory bandwidth allows is impossible: "
            "the weights lie in a cache, or the bandwidth was measured on a busy machine"
        )
    return found


def _run(job: Job) -> Measured:
    """Measure in a fresh interpreter."""
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as folder:
        job_file, out_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(job.model_dump_json())
        command = [sys.executable, "-m", "edgedistill.bench.measure", str(job_file), str(out_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_env(job))
        if not out_file.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise errors.StageError(
                f"the benchmark's process ended with status {done.returncode}: {last}",
                where=str(job.artifact),
                hint="status -9 is the system's answer to too little memory",
            )
        text = out_file.read_text()
    if '"kind"' in text.split(":", 1)[0]:
        failure = Failure.model_validate_json(text)
        kind = getattr(errors, failure.kind, errors.StageError)
        raise kind(failure.message, where=failure.where, hint=failure.hint)
    return Measured.model_validate_json(text)


def _env(job: Job) -> dict[str, str]:
    """The environment of the measuring process: libraries start as many threads as are timed."""
    return {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
