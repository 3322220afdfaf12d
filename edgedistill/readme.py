"""The README of an artifact: what it is, and the lines that run it."""

from __future__ import annotations

from edgedistill.manifest import MANIFEST_FILE, Manifest

README_FILE = "README.md"

# How each format is run by those who receive it.  {libraries} are filled in from the manifest.
RUN: dict[str, str] = {
    "gguf": """\
In Python, with `llama-cpp-python{llama-cpp-python}`; on Android and iOS link llama.cpp itself:

```python
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx={context_tokens}{cache_arguments})
answer = model.create_chat_completion([{{"role": "user", "content": "..."}}], temperature=0)
```
{cache_flags}""",
    "onnx": """\
In Python, with `onnxruntime-genai{onnxruntime-genai}` (the same package exists for Java, C# and C):

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length={context_tokens}, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(prompt))  # rendered with chat_template.jinja
while not generator.is_done():
    generator.generate_next_token()
```
""",
    "coreml": """\
In Swift, from iOS 18 or macOS 15, with the Core ML framework:

```swift
import CoreML

let compiled = try await MLModel.compileModel(at: packageURL)
let model = try MLModel(contentsOf: compiled)
let state = model.makeState()
let output = try await model.prediction(from: inputs, using: state)
```

The inputs are `input_ids` int32 [1, n], `causal_mask` float16 [1, 1, n, end] (0 where a token may
look, a large negative number elsewhere; `end` counts the tokens in the cache after the call) and
`logit_positions` int32 [m], `[n - 1]` for the last token alone.  The output is `logits` float16
[1, m, vocabulary].  The state keeps the cache.
""",
}

# Bits of the cache of keys and values -> what makes llama.cpp keep it so: arguments of `Llama` (in
# whose package 8 is the number of q8_0), and a line about its own programs.
CACHE: dict[int, tuple[str, str]] = {
    8: (
        ", type_k=8, type_v=8, flash_attn=True",
        """
All figures here were measured with keys and values cached in 8 bits, as above; llama.cpp's own
programs do so with `--cache-type-k q8_0 --cache-type-v q8_0`.
""",
    ),
}


def readme_of(manifest: Manifest) -> str:
    """The README's text; all figures are the manifest's."""
    m = manifest
    size = f"{m.size_bytes / 1e6:.1f} MB, {m.bits_per_weight:.2f} bits per weight"
    lines = [
        f"# {m.recipe} / {m.rung} / {m.format}",
        "",
        f"{m.student}, {m.parameters / 1e6:.1f}M parameters, {m.context_tokens} tokens of context; "
        f"{size}; licence: {m.license or 'not stated'}.",
        "",
        "Ships." if m.shippable else f"**Do not ship**: {m.why_not}.",
        *_quality(m),
        *_router(m),
        "",
        *_run(m),
        f"`{MANIFEST_FILE}` holds the sha256 of every file, the lineage, all measurements and the "
        f"versions that made them (edgedistill {m.edgedistill}).",
    ]
    return "\n".join(lines) + "\n"


def _quality(manifest: Manifest) -> list[str]:
    quality = manifest.quality
    if quality is None:
        return []
    overall = quality.slices[0]
    interval = overall.retention_interval
    return [
        "",
        f"Quality: {overall.score:.1%} right on {quality.cases:,} of {quality.cases_in_suite:,} "
        f"cases in {quality.runtime}; retention {overall.retention:.1%} "
        f"({interval.low:.1%} to {interval.high:.1%}).",
    ]


def _router(manifest: Manifest) -> list[str]:
    router = manifest.router
    if router is None or router.kept is None or router.accuracy is None:
        return []
    accuracy, interval = router.accuracy, router.accuracy.interval
    return [
        "",
        f"Router: answers with a confidence of at least {router.threshold:g} (the "
        f"{router.confidence}) stay on the device. On cases that the threshold was not fitted on, "
        f"{router.kept.value:.0%} of the traffic stays, of which {accuracy.value:.1%} is right "
        f"({interval.low:.1%} to {interval.high:.1%}).",
    ]


def _run(manifest: Manifest) -> list[str]:
    text = RUN.get(manifest.format)
    if text is None:
        return []
    settings = manifest.verification.settings if manifest.verification else {}
    known = {**manifest.libraries, **settings}
    libraries = {
        name: f"=={known[name]}" if name in known else ""
        for name in ("llama-cpp-python", "onnxruntime-genai")
    }
    arguments, flags = CACHE.get(manifest.kv_cache_bits or 16, ("", ""))
    return [
        text.format(
            context_tokens=manifest.context_tokens,
            cache_arguments=arguments,
            cache_flags=flags,
            **libraries,
        )
    ]
