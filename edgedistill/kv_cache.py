"""Bits of the cache of keys and values: what a recipe's targets ask for, and who can have it."""

from __future__ import annotations

from collections.abc import Iterator

from edgedistill.decoder import DecoderFacts
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.recipe import Recipe, Target
from edgedistill.recipe_yaml import Place


def kv_cache_bits_of(recipe: Recipe, rung: str, format_name: str) -> int | None:
    """The bits in which an artifact caches keys and values: its targets' choice, or the default.

    Args:
        recipe: checked, so that its targets agree.
        rung: of the artifact.
        format_name: that it is exported to.

    Returns:
        None where its runtime has no choice.
    """
    targets = recipe.all_targets().values()
    meant = [t for t in targets if t.format == format_name and _ships(t, rung)]
    return _bits(meant[0]) if meant else None


def kv_cache_problems(
    recipe: Recipe, facts: DecoderFacts | None
) -> Iterator[tuple[Place, str, str]]:
    """Targets whose choice their runtime does not have, or that another target contradicts.

    Args:
        recipe: with the targets.
        facts: of the student; None leaves out what depends on them.

    Yields:
        Place, message and hint of each.
    """
    if all(target.kv_cache_bits is None for target in recipe.targets.values()):
        return
    seen: dict[tuple[str, str], tuple[str, int | None]] = {}
    for name, target in recipe.targets.items():
        place: Place = ("targets", name, "kv_cache_bits")
        problem = _problem(target, facts)
        if problem is not None:
            yield place, *problem
            continue
        for rung in recipe.rungs:
            if not _ships(target, rung):
                continue
            other, bits = seen.setdefault((rung, target.format), (name, _bits(target)))
            if bits != _bits(target):
                yield (
                    place,
                    f"{_bits(target)}, but the target {other} ships the same artifact, "
                    f"{rung}/{target.format}, with {bits}",
                    "an artifact is measured with one: give both the same, or different `rungs`",
                )
                break


def _problem(target: Target, facts: DecoderFacts | None) -> tuple[str, str] | None:
    bits = target.kv_cache_bits
    if bits is None:
        return None
    runtime = load_plugin("exporters", target.format).runtime
    head_dim = facts.head_dim if facts is not None else None
    problem = load_plugin("runtimes", runtime).kv_cache_problem(bits, head_dim)
    if problem is None:
        return None
    able = [name for name in plugin_names("exporters") if _allows(name, bits, head_dim)]
    hint = f"take it out, or choose the format {' or '.join(able)}" if able else "take it out"
    return f"{target.format} runs in {runtime}: {problem}", hint


def _allows(format_name: str, bits: int, head_dim: int | None) -> bool:
    runtime = load_plugin("runtimes", load_plugin("exporters", format_name).runtime)
    return runtime.kv_cache_problem(bits, head_dim) is None


def _bits(target: Target) -> int | None:
    """What the target states; else the default of its runtime."""
    if target.kv_cache_bits is not None:
        return target.kv_cache_bits
    runtime = load_plugin("runtimes", load_plugin("exporters", target.format).runtime)
    return next(iter(runtime.kv_cache_choices), None)


def _ships(target: Target, rung: str) -> bool:
    return target.rungs is None or rung in target.rungs
