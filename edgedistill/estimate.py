"""What a build will cost, by arithmetic: bytes of artifacts, peak memory, minutes of evaluation.

Sizes are exact up to headers and tokenizer; memory and time are orders of magnitude, from runs on
two cores of an AMD EPYC with AVX2, and grow with the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgedistill.decoder import DecoderFacts
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid
from edgedistill.recipe import StageStep
from edgedistill.reference_model import HELD_BYTES
from edgedistill.stage import StageCost
from edgedistill.verify.judge import STRETCH_ENDS, STRETCH_TOKENS, TOKENS_PER_TEXT

# A process with numpy, and one with torch and transformers, before they hold a tensor.
BASE_BYTES = 120_000_000
TORCH_BASE_BYTES = 450_000_000
# Of three texts and the stretches of a long prompt.
JUDGED_TOKENS = 3 * TOKENS_PER_TEXT + len(STRETCH_ENDS) * STRETCH_TOKENS
# One case of about 40 new tokens, for each billion parameters, on two threads.
SECONDS_PER_CASE = {"gguf": 0.35, "onnx": 0.6, "coreml": 8.0}
REFERENCE_SECONDS_PER_CASE = 0.5
FLOAT32_OPERATIONS_PER_SECOND = 60e9  # of torch on two cores, on sequences of 512 tokens
# A yardstick for training elsewhere, not a device: what a consumer's GPU sustains in float32.
GPU_OPERATIONS_PER_SECOND = 10e12
OTHER_SECONDS_PER_CASE = 1.0
EXPANDED_BYTES = 1 << 30  # of Core ML's weights, as its interpreter holds them


def facts_of_rung(facts: DecoderFacts, stages: Sequence[StageStep]) -> DecoderFacts:
    """The facts of what the stages leave of a student."""
    for step in stages:
        facts = step.config.facts_after(facts)
    return facts


def tensor_bytes(
    facts: DecoderFacts, stages: Sequence[StageStep], format_name: str
) -> dict[str, float]:
    """Bytes of each tensor of a rung in a format, as its exporter stores it.

    A grid that the format does not hold, which a recipe is refused for, counts without padding.
    """
    exporter = load_plugin("exporters", format_name)()
    facts = facts_of_rung(facts, stages)
    matrices = set(facts.matrices())
    sizes, expected = {}, dict[str, dict[Grid, float]]()
    for name, shape in facts.tensor_shapes().items():
        kind = facts.short_name(name) or name  # blocks are alike: one of them is asked about
        if name in matrices and kind not in expected:
            expected[kind] = _expected_grids(name, facts, stages)
        grids = expected.get(kind, {})
        sizes[name] = 0.0 if grids else float(exporter.stored_bytes(shape, None))
        for grid, share in grids.items():
            held = exporter.holds(grid) and shape[1] % grid.group_size == 0
            whole = math.prod(shape) * grid.bits_per_weight / 8
            sizes[name] += share * (exporter.stored_bytes(shape, grid) if held else whole)
    return sizes


def _expected_grids(
    name: str, facts: DecoderFacts, stages: Sequence[StageStep]
) -> dict[Grid, float]:
    grids: dict[Grid, float] = {}
    for step in stages:
        grids = step.config.expected_grids(name, facts) or grids
    return grids


def artifact_bytes(facts: DecoderFacts, stages: Sequence[StageStep], format_name: str) -> int:
    """Bytes of the weights of a rung in a format: the sum of :func:`tensor_bytes`."""
    return int(sum(tensor_bytes(facts, stages, format_name).values()))


def judge_peak_bytes(facts: DecoderFacts) -> int:
    """Peak memory where ``transformers`` reads texts in float32, and a text's logits.

    A small student is held whole, of a large one a block, or the embedding; logits are in float32
    and in float64, before and after the softmax.
    """
    logits = TOKENS_PER_TEXT * facts.vocab_size * (4 + 8 + 8 + 4)
    weights = 4 * facts.parameters
    if weights > HELD_BYTES:
        shapes = facts.tensor_shapes()
        block = sum(math.prod(shapes[name]) for name in facts.linears(0).values())
        # A tensor and what it is read from, or dequantized through.
        weights = 4 * max(block, math.prod(shapes[facts.embedding])) * 2
    return TORCH_BASE_BYTES + weights + logits


def tensor_peak_bytes(facts: DecoderFacts) -> int:
    """Peak memory of a step that goes tensor by tensor: a few copies of the largest, a shard."""
    largest = max(math.prod(shape) for shape in facts.tensor_shapes().values())
    return BASE_BYTES + 4 * 4 * largest + 256 * 1024 * 1024


def stage_seconds(facts: DecoderFacts, cost: StageCost, *, on_gpu: bool = False) -> float:
    """Time of a stage that runs the student in float32: two operations a parameter and token."""
    rate = GPU_OPERATIONS_PER_SECOND if on_gpu else FLOAT32_OPERATIONS_PER_SECOND
    return cost.forward_tokens * 2 * facts.parameters / rate


def stage_peak_bytes(cost: StageCost) -> int:
    """Peak memory of a stage that runs the student."""
    return TORCH_BASE_BYTES + cost.held_bytes


def runtime_peak_bytes(
    facts: DecoderFacts, weight_bytes: int, format_name: str, *, judges: int = 0
) -> int:
    """Peak memory of a process that runs an artifact.

    Core ML's interpreter holds some of the weights in float32 as well.

    Args:
        facts: of the student.
        weight_bytes: of the artifact.
        format_name: of its exporter.
        judges: whose log-probabilities are mapped beside it, as verification does.
    """
    held = min(4 * facts.parameters, EXPANDED_BYTES) if format_name == "coreml" else 0
    mapped = judges * JUDGED_TOKENS * facts.vocab_size * 4
    return TORCH_BASE_BYTES + 2 * weight_bytes + held + mapped


def scoring_seconds(facts: DecoderFacts, cases: int, format_name: str | None) -> float:
    """Time to score ``cases`` with an artifact, or with the reference (``format_name`` None)."""
    if format_name is None:
        per_case = REFERENCE_SECONDS_PER_CASE
    else:
        per_case = SECONDS_PER_CASE.get(format_name, OTHER_SECONDS_PER_CASE)
    return cases * per_case * facts.parameters / 1e9
