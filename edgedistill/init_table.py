"""What ``edgedistill init`` found out, on the terminal: what the model is, what fits where."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgedistill.fit import DeviceFit
from edgedistill.init_report import InitReport
from edgedistill.report import words
from edgedistill.report.table import STYLES


def render_init(report: InitReport) -> Group:
    """The model, what it takes, and what of it fits where, to be printed by a rich console."""
    parts: list[RenderableType] = [*_student(report), Text("")]
    parts += [_sizes(report), Text(""), _devices(report), Text("")]
    parts.append(Text(_legend(report), style="dim"))
    for title, reasons in (("rung", report.left_out), ("format", report.refused_formats)):
        for name, why in reasons.items():
            parts.append(Text(words.visible(f"no {title} {name}: {why}"), style=STYLES["warn"]))
    parts += [Text(words.visible(f"mind: {w}"), style=STYLES["warn"]) for w in report.warnings]
    return Group(*parts)


def _student(report: InitReport) -> list[Text]:
    s = report.student
    heading = Text.assemble((words.visible(s.name), "bold"), f": {s.family}, ")
    heading.append(f"{s.parameters / 1e6:,.1f}M parameters, {words.visible(s.weights)}")
    if s.stored_bytes is not None:
        heading.append(f" ({words.megabytes(s.stored_bytes)} MB)")
    heading.append(", quantized" if s.quantized else ", float")
    tied = "tied" if s.tied_embeddings else "not tied"
    shape = (
        f"{s.layers} layers, hidden {s.hidden_size}, FFN {s.ffn_size}, {s.heads} heads of "
        f"{s.head_dim} ({s.kv_heads} of keys), vocabulary {s.vocab_size:,}, embeddings {tied}, "
        f"context up to {s.max_context_tokens:,}"
    )
    template = "a chat template" if s.chat_template else "no chat template"
    lines = [shape, f"tokenizer: {words.visible(s.tokenizer or 'none')}, {template}"]
    for adapter in s.adapters:
        fits = "fits" if adapter.problem is None else f"does not fit: {adapter.problem}"
        lines.append(words.visible(f"adapter {adapter.path}: {fits}"))
    return [heading, *map(Text, lines)]


def _sizes(report: InitReport) -> Table:
    table = _table("rung", "format", "weights\nMB", "bits/\nweight", "cache\nMB", "RAM\nMB")
    for place, row in enumerate(report.rows):
        if place and report.rows[place - 1].rung != row.rung:
            table.add_row()
        sizes = (row.weight_bytes, row.kv_cache_bytes, row.peak_ram_bytes)
        weights, cache, peak = map(words.megabytes, sizes)
        table.add_row(row.rung, row.format, weights, f"{row.bits_per_weight:.2f}", cache, peak)
    return table


def _devices(report: InitReport) -> Table:
    """Device x format x rung: whether it fits, and the tokens a second that memory allows."""
    rungs = list(dict.fromkeys(row.rung for row in report.rows))
    table = _table("device", "format", "app may\ntake MB", "memory\nGB/s", *rungs)
    rows = {(row.rung, row.format): row for row in report.rows}
    for device in report.devices:
        facts = (device.name, "", f"{device.app_ram_mb:,}", f"{device.bandwidth_gb_per_s:.1f}")
        for name in (f for f in device.formats if (rungs[0], f) in rows):
            cells = (_cell(rows[rung, name].on[device.name]) for rung in rungs)
            table.add_row(facts[0], name, *facts[2:], *cells)
            facts = ("", "", "", "")
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=True)
    return table


def _cell(fit: DeviceFit) -> Text:
    if not fit.fits:
        return Text("✗", style=STYLES["bad"])
    full, empty = (f"{rate:,.0f}" for rate in (fit.most_tok_per_s_full, fit.most_tok_per_s))
    rates = empty if full == empty else f"{full}–{empty}"
    return Text(f"✓ {rates}", style=STYLES["good"])


def _legend(report: InitReport) -> str:
    return (
        "By arithmetic on nominal figures; nothing was measured. Cache and RAM are at "
        f"{report.context_tokens:,} tokens.\n"
        "✓ fits into what an app may take there, ✗ does not; behind it the tokens a second that "
        "memory\nallows with a full and with an empty cache: a bound, no forecast."
    )
