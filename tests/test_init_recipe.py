"""The recipe that `init` writes is in order, says what is built, and builds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from edgedistill.build import Options, build
from edgedistill.errors import ExitCode, InputError
from edgedistill.init_choice import DoesNotFitError, choose, text_budget
from edgedistill.init_recipe import RecipeText, recipe_name
from edgedistill.init_report import Examined, examine
from edgedistill.offered_rungs import RUNGS
from edgedistill.preview import preview
from edgedistill.recipe import Name
from edgedistill.recipe_load import LoadedRecipe, load_recipe
from tests.recipes import write_suite
from tests.tiny import CORPUS, FAMILY_CONFIGS, HELD

Tiny = Callable[[str], Path]


def write(
    student: Path,
    path: Path,
    *,
    devices: tuple[str, ...] = (),
    text: Path | None = None,
    suites: tuple[Path, ...] = (),
    context: int | None = None,
) -> tuple[LoadedRecipe, Examined]:
    examined = examine(str(student), devices, context)
    choice = choose(examined, asked_devices=bool(devices), text=text, suites=suites)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RecipeText(examined, choice, "tiny", path).write(), encoding="utf-8")
    return load_recipe(path), examined


def write_text(path: Path, repeats: int = 40) -> Path:
    rows = ({"text": text} for _ in range(repeats) for text in CORPUS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_recipe_of_every_family_is_in_order_and_can_be_planned(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    text = write_text(tmp_path / "text.jsonl")
    loaded, _ = write(tiny(family), tmp_path / "recipes/tiny.yaml", text=text)
    recipe = loaded.recipe
    assert loaded.student is not None
    assert loaded.student.resolve() == tiny(family).resolve()
    assert list(recipe.rungs) == [rung.name for rung in RUNGS]
    able = tuple(name for name in ("gguf", "coreml", "onnx") if family in HELD[name])
    assert recipe.export == able
    assert recipe.context_tokens == 256
    plan = preview(Options(loaded.path, cache=tmp_path / "cache"))
    assert len(plan.artifacts) == len(RUNGS) * len(recipe.export or ())


def test_what_the_plan_says_of_sizes_is_what_init_says(tiny: Tiny, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    devices = ("pixel-6a", "iphone-13-pro")
    for chosen in ((), devices, devices[:1]):
        loaded, examined = write(tiny("llama"), tmp_path / "r.yaml", devices=chosen, text=text)
        plan = preview(Options(loaded.path, cache=tmp_path / "cache"))
        said = {(row.rung, row.format): row.weight_bytes for row in examined.report.rows}
        assert {(a.rung, a.format): a.weight_bytes for a in plan.artifacts} == said


def test_a_rung_that_trains_waits_for_a_text(tiny: Tiny, tmp_path: Path) -> None:
    loaded, _ = write(tiny("llama"), tmp_path / "r.yaml")
    assert list(loaded.recipe.rungs) == ["int8", "int4", "mixed"]
    text = loaded.path.read_text()
    assert "  # int2:\n  #   - quantize_gptq: {bits: 2" in text
    assert "Not built: trains on text of the app" in text
    # As they stand they are YAML: without the marks the recipe is in order, too.
    head, _, rungs = text.partition("rungs:\n")
    rungs, blank, rest = rungs.partition("\n\n")
    marked = ("  # int2:", "  #   - ")
    lines = (f"  {line[4:]}" if line.startswith(marked) else line for line in rungs.splitlines())
    loaded.path.write_text(f"{head}rungs:\n" + "\n".join(lines) + blank + rest)
    assert list(load_recipe(loaded.path).recipe.rungs) == [rung.name for rung in RUNGS]


def test_a_target_has_what_fits_there_and_what_is_left_for_its_files(
    tiny: Tiny, tmp_path: Path
) -> None:
    loaded, examined = write(tiny("llama"), tmp_path / "r.yaml", devices=("iphone-12",))
    targets = loaded.recipe.targets
    assert {name: t.format for name, t in targets.items()} == {
        "iphone-12": "coreml",
        "iphone-12-gguf": "gguf",
    }
    for target in targets.values():
        beside = examined.load.beside_weights(target.format) / 1e6
        assert target.budget.file_mb == pytest.approx(2100 - beside, abs=1)
    assert loaded.recipe.export is None


def test_what_does_not_fit_is_not_built(tmp_path: Path) -> None:
    student = write_headers(tmp_path / "large", layers=36)
    loaded, _ = write(student, tmp_path / "r.yaml", devices=("pixel-6a", "laptop"))
    targets = loaded.recipe.targets
    assert list(loaded.recipe.rungs) == ["int8", "int4", "mixed"]
    assert targets["pixel-6a"].rungs == ("int4", "mixed")
    assert targets["laptop"].rungs is None
    loaded, _ = write(student, tmp_path / "r.yaml", devices=("pixel-6a",))
    assert list(loaded.recipe.rungs) == ["int4", "mixed"]
    assert "Not built: does not fit" in loaded.path.read_text()


def test_where_nothing_fits_there_is_no_recipe(tmp_path: Path) -> None:
    student = write_headers(tmp_path / "large", layers=54)
    with pytest.raises(DoesNotFitError, match="nothing fits on iphone-12") as caught:
        write(student, tmp_path / "r.yaml", devices=("iphone-12",))
    assert caught.value.exit_code == ExitCode.BUDGET_NOT_MET
    assert "int2 would fit" in str(caught.value.hint)
    loaded, _ = write(
        student,
        tmp_path / "r.yaml",
        devices=("iphone-12",),
        text=write_text(tmp_path / "text.jsonl"),
    )
    assert list(loaded.recipe.rungs) == ["int2"]
    with pytest.raises(DoesNotFitError) as caught:
        write(student, tmp_path / "r.yaml", devices=("iphone-12",), context=65536)
    assert str(caught.value.hint).startswith("a shorter --context")


def test_mixed_bits_state_the_formats_that_their_size_was_taken_for(tmp_path: Path) -> None:
    student = write_headers(tmp_path / "large", layers=60)
    text = write_text(tmp_path / "text.jsonl")
    loaded, examined = write(student, tmp_path / "r.yaml", devices=("pixel-6a",), text=text)
    assert list(loaded.recipe.rungs) == ["mixed", "int2"]
    assert loaded.recipe.formats_of("mixed") == ("gguf",)
    assert "{bits_per_weight: 3.5, formats: [gguf, onnx]}" in loaded.path.read_text()
    plan = preview(Options(loaded.path, cache=tmp_path / "cache"))
    (planned,) = (a for a in plan.artifacts if a.rung == "mixed")
    (row,) = (r for r in examined.report.rows if (r.rung, r.format) == ("mixed", "gguf"))
    assert planned.weight_bytes == row.weight_bytes


def write_headers(directory: Path, layers: int) -> Path:
    """A student of SmolLM3's width without its weights: the header, and a hole behind it."""
    from edgedistill.decoder import DecoderFacts

    config = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    end, header = 0, {}
    for name, shape in DecoderFacts.from_config(config).tensor_shapes().items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    stated = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(stated).to_bytes(8, "little") + stated)
        file.truncate(8 + len(stated) + end)
    return directory


def test_a_suite_comes_with_a_floor_of_its_kind(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "data.jsonl")
    loaded, _ = write(tiny("llama"), tmp_path / "recipes/r.yaml", suites=(suite,))
    assert loaded.recipe.suite == (tmp_path / "recipes/../data.jsonl",)
    assert loaded.recipe.floor is not None
    assert loaded.recipe.floor.all_limits() == {"retention": 0.97}
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"id": "a", "kind": "text", "text": "The quick fox."}) + "\n")
    loaded, _ = write(tiny("llama"), tmp_path / "r.yaml", suites=(texts,))
    assert loaded.recipe.floor is not None
    assert loaded.recipe.floor.all_limits() == {"max_bits_per_byte_loss": 0.05}
    suite.write_text("{}\n")
    with pytest.raises(InputError, match="cannot be scored"):
        write(tiny("llama"), tmp_path / "r.yaml", suites=(suite,))


def test_the_adapter_in_the_students_directory_is_merged_and_another_is_named(
    tiny: Tiny, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(tiny("llama"), tmp_path / "models/student"))
    inside = write_adapter(student / "adapter", rows=64)
    loaded, examined = write(student, tmp_path / "r.yaml")
    (step,) = loaded.recipe.stages
    assert step.name == "merge_lora"
    assert inside.samefile(step.config.model_dump()["adapter"])
    write_adapter(tmp_path / "models/beside", rows=64)
    write_adapter(tmp_path / "models/foreign", rows=48)
    loaded, examined = write(student, tmp_path / "r.yaml")
    found = {Path(a.path).name: a for a in examined.report.student.adapters}
    assert {name: a.inside for name, a in found.items()} == {
        "adapter": True,
        "beside": False,
        "foreign": False,
    }
    assert "the student's is 64x64" in str(found["foreign"].problem)
    assert len(loaded.recipe.stages) == 1
    text = loaded.path.read_text()
    assert "#   - merge_lora: {adapter: models/beside}\n" in text
    assert "foreign" not in text


def write_adapter(directory: Path, rows: int) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": 4}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {"lora_A": np.ones((4, rows), np.float32), "lora_B": np.ones((64, 4), np.float32)}
    tensors = {f"{name}.{part}.weight": value for part, value in pair.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_a_text_is_shared_out_or_refused(tmp_path: Path) -> None:
    budget = text_budget(write_text(tmp_path / "text.jsonl", repeats=4000))
    assert (budget.calibrated, budget.held_out, budget.learned) == (16384, 4096, 32768)
    small = write_text(tmp_path / "small.jsonl", repeats=40)
    budget = text_budget(small)
    characters = sum(map(len, CORPUS)) * 40
    assert budget.calibrated + budget.held_out + budget.learned <= characters / 6
    assert min(budget.calibrated, budget.held_out, budget.learned) >= 512
    with pytest.raises(InputError, match="too few"):
        text_budget(write_text(tmp_path / "least.jsonl", repeats=2))
    with pytest.raises(InputError, match="no such file"):
        text_budget(tmp_path / "none.jsonl")


@given(st.text(max_size=90))
def test_any_name_becomes_one_that_a_recipe_may_have(text: str) -> None:
    assert TypeAdapter(Name).validate_python(recipe_name(text))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct.Q4_1"),
        ("mon modèle (v2)", "mon-modele-v2"),
        ("../../etc", "etc"),
        ("模型", "student"),
        ("-x", "x"),
    ],
)
def test_names_stay_as_near_as_they_may(text: str, name: str) -> None:
    assert recipe_name(text) == name


def test_a_directory_of_any_name_is_quoted(tiny: Tiny, tmp_path: Path) -> None:
    odd = 'a "b": {c} # \u2028 é\nd'
    student = Path(shutil.copytree(tiny("llama"), tmp_path / odd))
    loaded, _ = write(student, tmp_path / "r.yaml")
    assert loaded.student is not None
    assert loaded.student.samefile(student)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "trains"), [("llama3", False), ("gemma3", True)])
def test_the_recipe_builds_as_it_is(tiny: Tiny, tmp_path: Path, family: str, trains: bool) -> None:
    text = write_text(tmp_path / "text.jsonl") if trains else None
    loaded, examined = write(tiny(family), tmp_path / "tiny.yaml", text=text, devices=("laptop",))
    options = Options(loaded.path, cache=tmp_path / "cache", exports=tmp_path / "exports")
    report, _ = build(options, lambda _: None)
    assert [step.error for step in report.steps if step.error] == []
    rows = {(r.rung, r.format): r for r in examined.report.rows if r.rung != "int2" or trains}
    assert {(a.rung, a.format) for a in report.artifacts} == set(rows)
    for artifact in report.artifacts:
        verification = artifact.verification
        assert verification is not None
        assert verification.passed, verification.checks
        assert artifact.why_not == "unjudged: the recipe has no suite"
        stated = rows[artifact.rung, artifact.format].bits_per_weight
        if artifact.rung == "mixed":
            assert 0.9 * stated < artifact.bits_per_weight <= 3.5
        else:
            assert artifact.bits_per_weight == pytest.approx(stated, rel=2e-3)
    assert report.exit_code == ExitCode.OK
