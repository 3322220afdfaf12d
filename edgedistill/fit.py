"""What a student takes on devices, by arithmetic: bytes of weights and cache, memory, a roofline.

Nothing is run and nothing here is a measurement.  Bytes of weights are exact up to headers (of
mixed bits they are the target); memory is an estimate; a rate is what memory alone would allow, and
no program reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgedistill.decoder import DecoderFacts
from edgedistill.device_facts import Device
from edgedistill.document import Document
from edgedistill.estimate import tensor_bytes
from edgedistill.offered_rungs import OfferedRung
from edgedistill.plugins import load_plugin

# Bits of a key or value in the cache, where the runtime has no choice: ONNX Runtime's CPU kernel
# computes in float32, a Core ML state is float16.
CACHE_BITS = {"onnx": 32, "coreml": 16}
PREFILL_TOKENS = 512  # that go through the student at once
# What a process holds beyond weights, cache and activations: peak memory of the demo's artifacts as
# its manifests have it, less all that and Python (22 to 26 MB in llama.cpp with 8 bits, 115 to 122
# in ONNX Runtime).  Core ML's is not known: a guess.
PROGRAM_BYTES = {"gguf": 25_000_000, "onnx": 120_000_000, "coreml": 50_000_000}
OTHER_PROGRAM_BYTES = 120_000_000


class DeviceFit(Document):
    """A rung in one format on one device.

    Attributes:
        fits: whether the peak is within what an app may take there.
        spare_bytes: of that; negative where it does not fit.
        most_tok_per_s: what memory allows of decoding with an empty cache.
        most_tok_per_s_full: likewise with a full context.
    """

    fits: bool
    spare_bytes: int
    most_tok_per_s: float
    most_tok_per_s_full: float


class FitRow(Document):
    """A rung in one format.

    Attributes:
        weight_bytes: of the artifact.
        bits_per_weight: of all tensors, over the number of parameters.
        kv_cache_bits: of a key or value.
        kv_cache_bytes: of a full context.
        peak_ram_bytes: weights, cache, activations and program together.
        on: device -> how it fits there; devices that do not run the format are left out.
    """

    rung: str
    format: str
    weight_bytes: int
    bits_per_weight: float
    kv_cache_bits: int
    kv_cache_bytes: int
    peak_ram_bytes: int
    on: dict[str, DeviceFit]


@dataclass(frozen=True)
class Load:
    """What stands beside the weights, and is the same for every rung.

    Attributes:
        facts: of the student.
        context_tokens: that the cache is made for.
    """

    facts: DecoderFacts
    context_tokens: int

    def cache_bits(self, format_name: str) -> int:
        """Bits of a key or value: the default of the format's runtime."""
        runtime = load_plugin("runtimes", load_plugin("exporters", format_name).runtime)
        return next(iter(runtime.kv_cache_choices), CACHE_BITS.get(format_name, 16))

    def cache_bytes(self, format_name: str) -> int:
        """Of all keys and values; runtimes give layers with a window the whole context, too."""
        return self.facts.layers * self._layer_bytes(format_name, self.context_tokens)

    def cache_read_bytes(self, format_name: str) -> int:
        """That a decode step at the end of the context reads: of a window only what is in it."""
        windows = (self.facts.window_of(layer) for layer in range(self.facts.layers))
        seen = (min(w or self.context_tokens, self.context_tokens) for w in windows)
        return sum(self._layer_bytes(format_name, tokens) for tokens in seen)

    def beside_weights(self, format_name: str) -> int:
        """Bytes of cache, activations and program."""
        program = PROGRAM_BYTES.get(format_name, OTHER_PROGRAM_BYTES)
        return self.cache_bytes(format_name) + self._activation_bytes() + program

    def _layer_bytes(self, format_name: str, tokens: int) -> int:
        numbers = 2 * self.facts.kv_heads * self.facts.head_dim * tokens
        return numbers * self.cache_bits(format_name) // 8

    def _activation_bytes(self) -> int:
        """Float32 of a half block over the tokens of a prefill, and one position's logits."""
        facts = self.facts
        attention = 2 * facts.hidden_size + (facts.heads + 2 * facts.kv_heads) * facts.head_dim
        widest = 2 * facts.hidden_size + max(attention, 2 * facts.ffn_size)
        return 4 * (min(PREFILL_TOKENS, self.context_tokens) * widest + facts.vocab_size)


def fit_row(load: Load, rung: OfferedRung, format_name: str, devices: Sequence[Device]) -> FitRow:
    """The arithmetic of a rung in one format.

    A runtime that packs weights anew for its kernels (llama.cpp does with 4 bits on a CPU) holds
    them twice for a while.  They count once: the mapped file gives way where memory is short.

    Args:
        load: beside the weights.
        rung: that the format holds.
        format_name: of its exporter.
        devices: those among them that run the format are looked at.
    """
    facts = load.facts
    sizes = tensor_bytes(facts, rung.steps, format_name)
    weights = int(sum(sizes.values()))
    read = weights
    if not facts.tied_embeddings:  # of an embedding that is no head a token reads one row
        read -= int(sizes[facts.embedding] * (1 - 1 / facts.vocab_size))
    peak = weights + load.beside_weights(format_name)
    read_full = read + load.cache_read_bytes(format_name)
    return FitRow(
        rung=rung.name,
        format=format_name,
        weight_bytes=weights,
        bits_per_weight=weights * 8 / facts.parameters,
        kv_cache_bits=load.cache_bits(format_name),
        kv_cache_bytes=load.cache_bytes(format_name),
        peak_ram_bytes=peak,
        on={
            device.name: _on(device, peak, read, read_full)
            for device in devices
            if format_name in device.formats
        },
    )


def _on(device: Device, peak: int, read: int, read_full: int) -> DeviceFit:
    spare = device.app_ram_mb * 1_000_000 - peak
    bandwidth = device.bandwidth_gb_per_s * 1e9
    return DeviceFit(
        fits=spare >= 0,
        spare_bytes=spare,
        most_tok_per_s=bandwidth / read,
        most_tok_per_s_full=bandwidth / read_full,
    )
