"""Hold what an artifact says of itself against the student's ``config.json``.

Nothing is run and no weight is compared: these are the faults that a look at the bytes can name.
What is expected is read with ``transformers``, what is found with the format's own reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import InputError
from edgedistill.results import Check
from edgedistill.student import Student
from edgedistill.verify.lint_numbers import number_checks
from edgedistill.verify.lint_sliding import sliding_checks
from edgedistill.verify.side_files import read_ends, read_template
from edgedistill.verify.stated import Stated, describe

# How each format stores matrices, vectors, and the scales of quantized matrices.
# What a reader of a graph runs into where ends are missing or of another kind.
MALFORMED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
FLOATS = {
    "gguf": ("float16", "float32", "float16"),
    "onnx": ("float32", "float32", "float32"),
    "coreml": ("float16", "float16", "float16"),
}
COUNTS = {
    "layers": "layers",
    "hidden_size": "hidden size",
    "ffn_size": "ffn size",
    "heads": "heads",
    "kv_heads": "key and value heads",
    "head_dim": "head size",
    "vocab_size": "vocabulary",
}
# Families that a format calls otherwise than ``model_type``.
OTHER_WORDS = {("gguf", "mistral"): "llama", ("gguf", "gemma3_text"): "gemma3"}
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 1 + 1? "},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And\n\n2 + 2?"},
    ],
)


def lint_artifact(
    artifact: Path, format_name: str, student: Path, *, context_tokens: int
) -> list[Check]:
    """The checks ``lint: …`` of an artifact that edgedistill exported.

    Args:
        artifact: its directory.
        format_name: of its exporter; a format without a reader has no checks.
        student: the student directory that it was exported from.
        context_tokens: what it should claim.

    Raises:
        InputError: the artifact, or a file of the student, is missing or damaged.
    """
    stated = read_stated(artifact, format_name)
    if stated is None:
        return []
    opened = Student(student)
    checks = lint_stated(stated, student, format_name)
    found = stated.context_tokens
    checks.append(_same("context length", context_tokens, found))
    checks += _storage(stated, opened, format_name)
    if stated.tied_embeddings is not None:
        expected = bool(opened.config.get("tie_word_embeddings", False))
        checks.append(_same("tied embeddings", expected, stated.tied_embeddings))
    return checks


def read_stated(artifact: Path, format_name: str) -> Stated | None:
    """What an artifact says of itself; None for a format that has no reader here.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        return _read(artifact, format_name)
    except MALFORMED as error:
        problem = f"its parts do not fit together ({type(error).__name__}: {error})"
        raise InputError(problem, where=str(artifact)) from error


def _read(artifact: Path, format_name: str) -> Stated | None:
    if format_name == "gguf":
        from edgedistill.runtimes.llama_cpp import weights_file
        from edgedistill.verify.lint_gguf import read_gguf

        return read_gguf(weights_file(artifact))
    if format_name == "onnx":
        from edgedistill.verify.lint_onnx import read_onnx

        return read_onnx(artifact)
    if format_name == "coreml":
        from edgedistill.verify.lint_coreml import read_coreml

        return read_coreml(artifact)
    return None


def lint_stated(
    stated: Stated, student: Path, format_name: str, *, also_ends: Iterable[int] = ()
) -> list[Check]:
    """The checks that hold for anybody's file: counts, norms, RoPE, special tokens, template.

    Args:
        stated: what the artifact says.
        student: a student directory.
        format_name: ``gguf``, ``onnx`` or ``coreml``.
        also_ends: tokens at which the runtime stops although the file does not name them.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(student), trust_remote_code=False)
    checks = [
        _same(words, _count(config, name), stated.counts[name])
        for name, words in COUNTS.items()
        if name in stated.counts
    ]
    if stated.tokens is not None:
        checks.append(_same("tokens listed", config.vocab_size, stated.tokens))
    if stated.norm_epsilons:
        checks.append(_epsilon(stated, float(config.rms_norm_eps)))
    checks += [*_rope(stated, config), *sliding_checks(stated, config)]
    checks += number_checks(stated, config)
    checks += _special(stated, student, frozenset(also_ends))
    checks += _metadata(stated, config, student, format_name)
    return checks


def _epsilon(stated: Stated, expected: float) -> Check:
    found = sorted(stated.norm_epsilons)
    close = all(_near(value, expected, stated.norm_tolerance) for value in found)
    return _check("norm epsilon", close, f"{expected:.4g}", _list(found))


def expected_rope(config: Any) -> tuple[float, np.ndarray]:
    """(theta, float64 [head_dim / 2] of divisors), by the code that ``transformers`` runs.

    Of a decoder with sliding layers those of the layers that attend to all.
    """
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = config.rope_parameters
    if "full_attention" in parameters:
        theta = float(parameters["full_attention"]["rope_theta"])
        frequencies = Gemma3RotaryEmbedding(config).full_attention_inv_freq.double().numpy()
    else:
        theta = float(parameters["rope_theta"])
        frequencies = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    count = len(frequencies)
    return theta, theta ** (-np.arange(count) / count) / frequencies


def _rope(stated: Stated, config: Any) -> list[Check]:
    theta, divisors = expected_rope(config)
    checks = []
    equal = _same_frequencies(stated, theta, divisors)
    if stated.rope_theta is not None:
        passed = equal or _near(stated.rope_theta, theta, stated.rope_tolerance)
        checks.append(_check("RoPE theta", passed, f"{theta:g}", f"{stated.rope_theta:.7g}"))
    if stated.rope_divisors is not None:
        found = stated.rope_divisors
        # The base's own error shows in every frequency, so the tables' tolerance holds twice.
        same = equal or _all_near(found, divisors, 2 * stated.rope_tolerance)
        spans = (f"frequencies divided by {_span(each)}" for each in (divisors, found))
        checks.append(_check("RoPE scaling", same, *spans))
    return checks


def _same_frequencies(stated: Stated, theta: float, divisors: np.ndarray) -> bool:
    """Whether base and divisors together give what is expected, however they share it.

    Tables do not tell them apart where a scaling divides the fastest frequencies too, as YaRN does
    in a small head.
    """
    if stated.rope_theta is None or stated.rope_divisors is None:
        return False
    places = np.arange(len(divisors)) / len(divisors)
    expected = theta**-places / divisors
    count = len(stated.rope_divisors)
    found = stated.rope_theta ** -(np.arange(count) / count) / stated.rope_divisors
    return _all_near(found, expected, stated.rope_tolerance)


def _all_near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    same_shape = found.shape == expected.shape
    return same_shape and bool(np.allclose(found, expected, rtol=tolerance, atol=0))


def _special(stated: Stated, student: Path, also_ends: frozenset[int]) -> list[Check]:
    from edgedistill.chat import load_tokenizer

    tokenizer, checks = load_tokenizer(student), []
    if stated.end_ids is not None:
        expected = read_ends(student)
        own = {tokenizer.eos_token_id} - {None}
        expected |= frozenset(own)
        found = stated.end_ids
        # A file names no other end, and every end stops the runtime, which may know it by name.
        passed = found <= expected <= found | also_ends
        checks.append(_check("EOS", passed, _list(sorted(expected)), _list(sorted(found))))
    begin = {tokenizer.bos_token_id, Student(student).config.get("bos_token_id")} - {None}
    if stated.bos_id is not None and begin:
        known = " or ".join(str(i) for i in sorted(begin))
        checks.append(_check("BOS", stated.bos_id in begin, known, stated.bos_id))
    if stated.adds_bos is not None:
        ids = tokenizer("a").input_ids
        adds = bool(ids) and ids[0] == tokenizer.bos_token_id
        checks.append(_same("BOS put before a text", adds, stated.adds_bos))
    return checks


def _metadata(stated: Stated, config: Any, student: Path, format_name: str) -> list[Check]:
    checks = []
    if stated.architecture is not None:
        wanted = OTHER_WORDS.get((format_name, config.model_type), config.model_type)
        said = ", ".join(f"{k} {v!r}" for k, v in stated.metadata.items())
        passed = stated.architecture == wanted
        checks.append(_check("architecture", passed, wanted, stated.architecture, said))
    template = read_template(student)
    if stated.has_template and (template is not None or stated.chat_template is not None):
        checks.append(_template(template, stated.chat_template, student))
    return checks


def _template(expected: str | None, found: str | None, student: Path) -> Check:
    """Equal texts, or texts that render conversations equally."""
    from jinja2 import TemplateError

    from edgedistill.chat import load_tokenizer

    if expected is None or found is None:
        states = ("none" if t is None else f"{len(t)} characters" for t in (expected, found))
        return _check("chat template", False, *states)
    if expected == found:
        return _check("chat template", True, *["the same text"] * 2)
    tokenizer = load_tokenizer(student)
    for conversation in CONVERSATIONS:
        rendered = []
        for template in (expected, found):
            try:
                text = tokenizer.apply_chat_template(
                    conversation, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except (TemplateError, TypeError, ValueError) as error:
                text = f"{type(error).__name__}: {error}"
            rendered.append(str(text))
        if rendered[0] != rendered[1]:
            return _check("chat template", False, repr(rendered[0]), repr(rendered[1]))
    return _check("chat template", True, *["another text that renders the same"] * 2)


def _storage(stated: Stated, student: Student, format_name: str) -> list[Check]:
    """Every tensor on the student's grid, its scales in the format's dtype; the head apart."""
    facts = student.facts
    outer = {facts.embedding, facts.head}
    wrong: dict[bool, list[str]] = {True: [], False: []}
    kinds: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, shape in facts.tensor_shapes().items():
        wanted = _wanted(student, name, len(shape) == 2, format_name)
        key = name.replace(".", "_") if format_name == "coreml" else name
        found = stated.storage.get(key, "missing")
        kinds[name in outer][found] += 1
        if found != wanted:
            wrong[name in outer].append(f"{name}: {found}, expected {wanted}")
    return [
        Check(
            name=f"lint: {words}",
            passed=not wrong[is_outer],
            value=float(len(wrong[is_outer])),
            limit=0.0,
            detail=wrong[is_outer][0]
            if wrong[is_outer]
            else ", ".join(f"{n} x {kind}" for kind, n in kinds[is_outer].most_common()),
        )
        for is_outer, words in ((False, "dtypes"), (True, "embedding and head"))
    ]


def _wanted(student: Student, name: str, matrix: bool, format_name: str) -> str:
    matrices, vectors, scales = FLOATS[format_name]
    grid = student.grids.get(name)
    if grid is None:
        return matrices if matrix else vectors
    zeros = grid.zero == "integer"
    if format_name == "onnx":  # it assumes 2^(bits - 1), and is told of any other zero
        zeros = zeros or grid.fixed_zero != 1 << (grid.bits - 1)
    return describe(grid.bits, grid.group_size, zeros=zeros, scales=scales)


def _count(config: Any, name: str) -> int:
    heads = int(config.num_attention_heads)
    values = {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.intermediate_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }
    return int(values[name])


def _same(words: str, expected: object, found: object) -> Check:
    return _check(words, expected == found, expected, found)


def _check(words: str, passed: bool, expected: object, found: object, more: str = "") -> Check:
    shown = f"{found}" if found is not None else "not stated"
    detail = shown if passed and str(expected) == shown else f"{shown}, expected {expected}"
    return Check(
        name=f"lint: {words}", passed=passed, detail=f"{detail}; {more}" if more else detail
    )


def _near(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * abs(expected)


def _list(values: Iterable[object]) -> str:
    return ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values) or "none"


def _span(divisors: np.ndarray) -> str:
    low, high = float(divisors.min(initial=np.inf)), float(divisors.max(initial=-np.inf))
    return f"{low:.4g}" if _near(low, high, 1e-3) else f"{low:.4g} to {high:.4g}"
