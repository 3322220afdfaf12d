"""The roofline of decoding: a token cannot come faster than the weights can be read.

One decode step of a dense decoder reads every weight once, so its rate is bounded by memory
bandwidth / bytes read per token (Williams, Waterman, Patterson: "Roofline", CACM 52(4), 2009).
The bandwidth is measured here, on the threads that the benchmark uses, by reading an array that no
cache holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.quantized import Grid

ARRAY_BYTES = 256 * 1024 * 1024  # all threads together: several times any last-level cache
PASSES = 8

Bytes = npt.NDArray[np.uint8]
# Reductions that numpy vectorizes and runs without the interpreter lock; which of them keeps up
# with the memory depends on the CPU, so the fastest one counts.
READS: dict[str, Callable[[Bytes], Any]] = {
    "max of int32": lambda chunk: chunk.view(np.int32).max(),
    "max of uint8": lambda chunk: chunk.max(),
    "or of uint64": lambda chunk: np.bitwise_or.reduce(chunk.view(np.uint64)),
}


def read_bandwidth_gb_per_s(threads: int, array_bytes: int = ARRAY_BYTES) -> float:
    """Bandwidth of reading memory with ``threads`` threads, the best of several passes, in GB/s.

    The best and not the median: a roofline is what the machine can do when it is left alone.
    """
    chunk_bytes = array_bytes // threads // 64 * 64
    chunks = [np.ones(chunk_bytes, dtype=np.uint8) for _ in range(threads)]
    best_s = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for read in READS.values():
            for _ in range(PASSES):
                start = time.perf_counter()
                list(pool.map(read, chunks))
                best_s = min(best_s, time.perf_counter() - start)
    return threads * chunk_bytes / best_s / 1e9


def bytes_per_token(
    facts: DecoderFacts,
    grids: Mapping[str, Grid],
    weight_bytes: int,
    depth_tokens: int,
    *,
    kv_cache_bits: int = 16,
) -> int:
    """Bytes that one decode step has to read, from below.

    Weights are read once.  Of an embedding that is not tied to the head only one row is: it is
    left out.  The cache of keys and values counts without scales, and as float16 where its bits
    are nobody's choice, although a runtime may keep more.

    Args:
        facts: of the student.
        grids: of its quantized tensors; empty when it is float.
        weight_bytes: of all weight data in the artifact.
        depth_tokens: tokens in the cache; a layer with a sliding window reads those in it.
        kv_cache_bits: of one number in it.
    """
    token = 2 * facts.kv_heads * facts.head_dim * kv_cache_bits // 8
    windows = (facts.window_of(layer) or depth_tokens for layer in range(facts.layers))
    read = weight_bytes + sum(token * min(window, depth_tokens) for window in windows)
    if facts.tied_embeddings:
        return read
    rows, columns = facts.vocab_size, facts.hidden_size
    bits = _stored_bits(facts, grids, weight_bytes).get(facts.embedding, 16.0)
    return read - int((rows - 1) * columns * bits / 8)


def _stored_bits(
    facts: DecoderFacts, grids: Mapping[str, Grid], weight_bytes: int
) -> dict[str, float]:
    """Bits per weight of each tensor: a grid's own, and what is left of the bytes for floats."""
    counts = {name: math.prod(shape) for name, shape in facts.tensor_shapes().items()}
    on_grid = sum(counts[n] * g.bits_per_weight for n, g in grids.items() if n in counts)
    floats = sum(count for name, count in counts.items() if name not in grids)
    float_bits = min(32.0, max(16.0, (8 * weight_bytes - on_grid) / max(1, floats)))
    return {n: grids[n].bits_per_weight if n in grids else float_bits for n in counts}


def decode_roofline_share(
    decode_tok_per_s: float, bandwidth_gb_per_s: float, read_bytes: int
) -> float:
    """Measured decode rate / the rate at which memory alone would allow it."""
    return decode_tok_per_s * read_bytes / (bandwidth_gb_per_s * 1e9)
