"""The recipe that ``edgedistill init`` writes, comment by comment."""

from __future__ import annotations

import os
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.init_choice import Choice, ChosenTarget
from edgedistill.init_report import Examined
from edgedistill.offered_rungs import OfferedRung
from edgedistill.plugins import load_plugin
from edgedistill.report.words import visible
from edgedistill.search.found_recipe import flow
from edgedistill.search.ladder import StepData

LONGEST_NAME = 64
BUILT_IN_TOKENS = 1536  # about as many as the built-in texts have
COMMENT_COLUMNS = 98
RETENTION_FLOOR, BITS_PER_BYTE_FLOOR = 0.97, 0.05


def recipe_name(text: str) -> str:
    """A name that a recipe and a directory may have, as near to ``text`` as that allows."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:LONGEST_NAME].rstrip("-._")
    return name or "student"


@dataclass(frozen=True)
class RecipeText:
    """Writes one recipe.

    Attributes:
        examined: the student.
        choice: what is built of it.
        name: of the recipe.
        path: of the file, which the paths in it are relative to.
    """

    examined: Examined
    choice: Choice
    name: str
    path: Path

    def write(self) -> str:
        """The text of the YAML."""
        parts = (
            *(self._head, self._student, self._context, self._chat, self._calibration),
            *(self._stages, self._rungs, self._targets, self._suite, self._build),
        )
        return "\n".join("".join(f"{line}\n" for line in part()) for part in parts)

    def _head(self) -> Iterator[str]:
        student = self.examined.report.student
        shown = visible(str(self.path)).replace("\n", " ")
        yield f"# {self.name}: a first recipe by `edgedistill init`, to be changed at will."
        yield "#"
        yield f"#     edgedistill plan  {shown}    # what would run, and for how long"
        yield f"#     edgedistill build {shown}"
        yield "#"
        yield from _comment(
            f"A {student.family} decoder of {student.parameters / 1e6:,.1f}M parameters: "
            f"{student.layers} layers, hidden {student.hidden_size}, "
            f"{student.heads} heads ({student.kv_heads} of keys), FFN {student.ffn_size}, "
            f"{student.vocab_size} tokens, embedding and head "
            f"{'tied' if student.tied_embeddings else 'apart'}; {visible(student.weights)}."
        )

    def _student(self) -> Iterator[str]:
        student = self.examined.report.student
        yield "# Of the directory in exports/."
        yield f"name: {flow(self.name)}"
        yield "# What the artifacts may be used under; manifest and report say it."
        yield "# license: apache-2.0"
        yield ""
        yield "# A directory, a .gguf file, pkg://package/file.gguf or hf://org/name@REVISION."
        for warning in self.examined.report.warnings:
            yield from _comment(f"Mind: {warning}.")
        path = self.examined.student.path
        local = path is not None and "://" not in student.source
        yield f"student: {flow(self._relative(path) if local and path else student.source)}"

    def _context(self) -> Iterator[str]:
        report, load = self.examined.report, self.examined.load
        cache = ", ".join(f"{load.cache_bytes(f) / 1e6:,.1f} MB in {f}" for f in self._formats())
        yield from _comment(
            f"What the artifacts claim; the model's own is {report.student.max_context_tokens}. "
            f"At this length the cache of keys and values takes {cache}."
        )
        yield f"context_tokens: {report.context_tokens}"

    def _chat(self) -> Iterator[str]:
        if not self.examined.report.student.chat_template:
            yield from _comment(
                "The model has no chat template, so suites of conversations cannot be run on it."
            )
            return
        yield "# The fixed part of every conversation, as the app sends it."
        yield "# chat: {system: You are a helpful assistant.}"

    def _calibration(self) -> Iterator[str]:
        text = self.choice.text
        if text is None:
            yield from _comment(
                "Text of the app's own kind, JSON lines or plain, for the stages that look at what "
                "the student computes with: {file: data/train.jsonl, tokens: 16384}. Without a "
                "file they read three short built-in texts, which will do to try things out. "
                "Never give the suite."
            )
            yield f"calibration: {{tokens: {BUILT_IN_TOKENS}}}"
            return
        yield "# Text of the app's own kind, for the stages that look at what the student computes."
        yield "# The tokens are an estimate from below; take more if there is more."
        yield f"calibration: {flow(self._calibration_fields())}"

    def _calibration_fields(self) -> dict[str, Any]:
        assert self.choice.text is not None
        return {
            "file": self._relative(self.choice.text.file),
            "tokens": self.choice.text.calibrated,
        }

    def _stages(self) -> Iterator[str]:
        adapters = [a for a in self.examined.report.student.adapters if a.problem is None]
        inside = [a for a in adapters if a.inside]
        yield from _comment(
            "What all rungs share: adapters, pruning. Adapters make the reference that everything "
            "is compared with."
        )
        merged = inside if len(inside) == 1 else []
        if len(adapters) > len(merged):
            yield from _comment("Adapters that fit this model lie beside it; merge those you mean.")
        mark = "" if merged else "# "
        if adapters:
            yield f"{mark}stages:"
        else:
            yield "# stages:"
            yield "#   - merge_lora: {adapter: data/adapter}"
        for adapter in adapters:
            step = {"merge_lora": {"adapter": self._relative(Path(adapter.path))}}
            yield f"{'' if adapter in merged else '# '}  - {_step(step)}"

    def _rungs(self) -> Iterator[str]:
        yield "# How: variants of the same student, from the safest to the smallest."
        yield "rungs:"
        for rung in self.examined.rungs:
            why = self.choice.aside.get(rung.name)
            for line in rung.what:
                yield f"  # {line}"
            yield f"  # {self._sizes(rung.name)}"
            if why is not None:
                yield f"  # Not built: {why}."
            mark = "" if why is None else "# "
            yield f"  {mark}{rung.name}:"
            for step in rung.data:
                yield f"  {mark}  - {_step(self._filled_in(rung, step))}"
        for name, why in self.examined.report.left_out.items():
            yield from _comment(f"{name} is impossible here: {visible(why)}.", indent=2)

    def _sizes(self, rung: str) -> str:
        rows = [row for row in self.examined.report.rows if row.rung == rung]
        sizes = (f"{row.format} {row.weight_bytes / 1e6:,.1f}" for row in rows)
        return f"MB of weights: {', '.join(sizes)}."

    def _filled_in(self, rung: OfferedRung, step: StepData) -> StepData:
        """With the tokens that there are, and the formats that the sizes were taken for."""
        (stage, fields), text = next(iter(step.items())), self.choice.text
        if stage == "recover" and text is not None:
            fields = {**fields, "tokens": text.learned, "held_out_tokens": text.held_out}
        by_format = "formats" in load_plugin("stages", stage).model_fields
        exported = {t.format for t in self.choice.targets if rung.name in t.rungs}
        if by_format and exported and exported != set(self.examined.formats):
            fields = {**fields, "formats": list(self.examined.formats)}
        return {stage: fields}

    def _targets(self) -> Iterator[str]:
        for name, why in self.examined.report.refused_formats.items():
            yield from _comment(f"{name} is not among the formats: {visible(why)}.")
        if not self.choice.targets:
            yield "# Where: formats alone. `targets` would add devices and what it may cost there:"
            yield f"#   phone: {{format: {self._formats()[0]}, budget: {{file_mb: 200}}}}"
            yield f"export: [{', '.join(self._formats())}]"
            return
        yield from _comment(
            "Where. `file_mb` is what the cache at this context, activations and program leave of "
            "what an app may take, by arithmetic on nominal figures; hold it against the device. "
            "Take out formats that the app does not use."
        )
        yield "targets:"
        for target in self.choice.targets:
            yield from self._target(target)

    def _target(self, target: ChosenTarget) -> Iterator[str]:
        load, built = self.examined.load, self.choice.rungs
        fields: dict[str, Any] = {"format": target.format}
        if target.rungs != built:
            fields["rungs"] = list(target.rungs)
        fields["budget"] = {"file_mb": target.file_mb}
        yield f"  {target.name}: {flow(fields)}"
        yield f"    # peak_ram_mb: {target.app_ram_mb} would hold the machine that builds to it."
        runtime = load_plugin("runtimes", load_plugin("exporters", target.format).runtime)
        if runtime.kv_cache_problem(8, load.facts.head_dim) is None:
            saved = load.cache_bytes(target.format) * 7.5 / 16 / 1e6
            yield f"    # kv_cache_bits: 8 would save {saved:,.1f} MB of cache."

    def _suite(self) -> Iterator[str]:
        if not self.choice.suites:
            yield from _comment(
                "What decides whether a rung may ship: cases (docs/suites.md; `edgedistill suite "
                "from-logs` drafts some) and a floor. Without them everything stays unjudged."
            )
            yield "# suite: data/suite.jsonl"
            yield f"# floor: {{retention: {RETENTION_FLOOR}}}"
            return
        from edgedistill.evaluate.suite import TextCase, load_suite

        texts = [isinstance(case, TextCase) for case in load_suite(self.choice.suites)]
        floor = {} if all(texts) else {"retention": RETENTION_FLOOR}
        floor |= {"max_bits_per_byte_loss": BITS_PER_BYTE_FLOOR} if any(texts) else {}
        suites = [self._relative(path) for path in self.choice.suites]
        yield f"# {len(texts)} cases."
        yield f"suite: {flow(suites if len(suites) > 1 else suites[0])}"
        yield from _comment(
            "What an artifact has to keep of the reference. Set it before anything is built; "
            "`edgedistill plan` says whether the suite can decide it."
        )
        yield f"floor: {flow(floor)}"

    def _build(self) -> Iterator[str]:
        yield "# What a build may take of this machine; `edgedistill plan` says what it needs."
        yield "# build: {threads: 2, peak_ram_gb: 8}"

    def _formats(self) -> list[str]:
        exported = [t.format for t in self.choice.targets] or self.examined.formats
        return list(dict.fromkeys(exported))

    def _relative(self, path: Path) -> str:
        """As the recipe's directory sees it; a link at its end stays one."""
        whole = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
        return Path(os.path.relpath(whole, self.path.parent.resolve())).as_posix()


def _step(step: StepData) -> str:
    ((stage, fields),) = step.items()
    return f"{stage}: {flow(fields)}"


def _comment(text: str, indent: int = 0) -> Sequence[str]:
    mark = " " * indent + "# "
    words = " ".join(text.split())
    return textwrap.wrap(
        words,
        COMMENT_COLUMNS,
        initial_indent=mark,
        subsequent_indent=mark,
        break_long_words=False,
        break_on_hyphens=False,
    )
