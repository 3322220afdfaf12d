"""``edgedistill approve``: consent to what an artifact lost on a slice, on the record."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from edgedistill.content import sha256_file, sha256_json
from edgedistill.errors import InputError, UsageError
from edgedistill.evaluate.waivers import Waiver, append_waiver, waivers_beside
from edgedistill.manifest import MANIFEST_FILE, Manifest
from edgedistill.recipe_yaml import read_yaml
from edgedistill.results import FloorCheck

LONGEST_DAYS = 366  # a waiver that never ends is a lower floor


def approve(
    artifact: Path,
    *,
    slice_name: str,
    because: str,
    by: str,
    until: str,
    recipe: Path | None,
    today: date,
) -> tuple[Waiver, Path]:
    """Record a waiver for every clause that an artifact failed on a slice.

    Args:
        artifact: its directory, as a build published it.
        slice_name: of the slice, ``all`` for the whole suite.
        because: the reason, ``by`` the name of who consents.
        until: the last day, as 2026-01-31; at most a year from now.
        recipe: beside which the waivers lie; None for ``recipes/<name>.yaml``.
        today: the day of the consent.

    Returns:
        The waiver, and the file that holds it now.

    Raises:
        UsageError: there is nothing to consent to, the date is wrong, or the recipe is another.
        InputError: the artifact's manifest or its files are damaged, or the waivers are.
    """
    _check_until(until, today)
    manifest = read_manifest(artifact)
    checks = _failed_checks(manifest, slice_name, artifact)
    path = recipe or Path("recipes") / f"{manifest.recipe}.yaml"
    waivers = _waivers_of(path, manifest.recipe)
    try:
        waiver = Waiver(
            slice=slice_name,
            by=by.strip(),
            because=because.strip(),
            on=today.isoformat(),
            until=until,
            recipe=manifest.recipe,
            rung=manifest.rung,
            format=manifest.format,
            sha256=artifact_sha256(artifact, manifest),
            consented={check.clause: check.value for check in checks if check.value is not None},
        )
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        message = item["msg"].removeprefix("Value error, ")
        raise UsageError(f"--{item['loc'][0]}: {message}, not {item['input']!r}") from error
    append_waiver(waivers, waiver, recipe=path)
    return waiver, waivers


def read_manifest(artifact: Path) -> Manifest:
    """The manifest of a published artifact.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = artifact / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            hint="give the directory of an artifact, exports/RECIPE/RUNG/FORMAT",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(
            f"is not a manifest: {key} {first['msg']}", where=str(path), hint="build it again"
        ) from error


def artifact_sha256(artifact: Path, manifest: Manifest) -> str:
    """The hash of the names and bytes of all files that ship.

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """
    found = {}
    for file in manifest.files:
        name = PurePosixPath(file.path)
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"names a file outside: {file.path}", where=str(artifact))
        found[file.path] = sha256_file(artifact / file.path)
        if found[file.path] != file.sha256:
            raise InputError(
                "is not the file that was judged (another sha256)",
                where=str(artifact / file.path),
                hint="build it again",
            )
    return sha256_json(found)


def _check_until(until: str, today: date) -> None:
    try:
        last = date.fromisoformat(until)
    except ValueError as error:
        raise UsageError(
            f"--until {until}: is not a date", hint="write it as 2026-01-31"
        ) from error
    if last < today:
        raise UsageError(f"--until {until}: is past", hint="a waiver holds from today on")
    if last > today + timedelta(days=LONGEST_DAYS):
        raise UsageError(
            f"--until {until}: is more than a year ahead",
            hint="renew it then, or lower the floor in the recipe for all to see",
        )


def _failed_checks(manifest: Manifest, slice_name: str, artifact: Path) -> list[FloorCheck]:
    """The clauses of a slice that failed, those that are waived already too."""
    floor = manifest.quality.floor if manifest.quality else []
    failed = [check for check in floor if check.verdict == "fail" or check.waived]
    checks = [check for check in failed if check.slice == slice_name]
    if checks:
        return checks
    slices = ", ".join(dict.fromkeys(check.slice for check in failed))
    hint = f"it failed on {slices}" if slices else "it failed nowhere; see its report"
    raise UsageError(
        f"--slice {slice_name}: no clause failed there", where=str(artifact), hint=hint
    )


def _waivers_of(recipe: Path, name: str) -> Path:
    """The file of the recipe's waivers.

    Raises:
        UsageError: there is no such recipe, or it is another one.
    """
    document = read_yaml(recipe)
    if document.problems:
        error = document.problems[0]
        raise UsageError(error.message, where=error.where, hint="name the recipe: --recipe FILE")
    data = document.data if isinstance(document.data, dict) else {}
    if data.get("name") != name:
        raise UsageError(
            f"is the recipe {data.get('name')!r}, but the artifact is of {name!r}",
            where=str(recipe),
            hint="name the recipe: --recipe FILE",
        )
    stated = data.get("waivers")
    if isinstance(stated, str):
        return recipe.parent / Path(stated).expanduser()
    return waivers_beside(recipe)
