"""Every planted fault is caught by the check that is meant for it, in every format it can be in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from edgedistill.errors import InputError
from edgedistill.stage import Stage
from edgedistill.stages.quantize_rtn import QuantizeRtn
from tests.artifact_tensors import CORE_ML
from tests.graph_faults import GRAPH_FAULTS
from tests.mutations import ALL, Fault
from tests.peaked import Good, export, make_good, verify
from tests.tiny import EXPORTS
from tests.token_faults import TOKEN_FAULTS
from tests.weight_faults import WEIGHT_FAULTS

pytestmark = pytest.mark.slow

RUNGS: dict[str, dict[str, list[Stage]]] = {
    "llama": {"float": [], "int8": [QuantizeRtn(bits=8)], "int4": [QuantizeRtn(bits=4)]},
    "llama3": {"float": []},
    "mistral": {"float": []},
    "qwen2": {"float": []},
    "qwen3": {"float": []},
    "gemma3": {"float": []},
}
MADE = [
    (f"{family}/{rung}", format_name)
    for family, rungs in RUNGS.items()
    for rung in rungs
    for format_name in ALL
    if (family, format_name) in EXPORTS
]
FAULTS = [*GRAPH_FAULTS, *WEIGHT_FAULTS, *TOKEN_FAULTS]
PLANTED = [(fault, name) for fault in FAULTS for name in fault.plants]
OF_THE_MODEL = [fault for fault in FAULTS if fault.distance is not None]
# Nats a token: well above what any runtime's own rounding does to a float artifact (1e-4).
LEAST_EFFECT = 1e-2
WEIGHTS = {
    "gguf": "model.gguf",
    "onnx": "model.onnx.data",
    "coreml": str(CORE_ML / "weights/weight.bin"),
}


@dataclass(frozen=True)
class Workshop:
    """Good students by ``family/rung``, and their artifacts by format; each is made once."""

    root: Path
    goods: dict[str, Good]

    def good(self, name: str) -> Good:
        if name not in self.goods:
            family = name.split("/")[0]
            made = make_good(self.root / family, family, RUNGS[family])
            self.goods.update({f"{family}/{rung}": good for rung, good in made.items()})
        return self.goods[name]

    def artifact(self, name: str, format_name: str) -> Path:
        path = self.root / "artifacts" / name / format_name
        if not path.exists():
            export(self.good(name).rung.student, path, format_name)
        return path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), {})


def _names(fault: Fault) -> str:
    return fault.name.replace(" ", "-").replace("/", "-")


@pytest.mark.parametrize(("name", "format_name"), MADE)
def test_the_artifacts_are_good_before_a_fault_is_planted(
    workshop: Workshop, name: str, format_name: str
) -> None:
    found = verify(workshop.good(name), workshop.artifact(name, format_name), format_name)
    assert [check for check in found.checks if not check.passed] == []


@pytest.mark.parametrize(
    ("fault", "format_name"), PLANTED, ids=[f"{_names(f)}-{name}" for f, name in PLANTED]
)
def test_a_planted_fault_is_caught_by_the_check_that_is_meant_for_it(
    workshop: Workshop, tmp_path: Path, fault: Fault, format_name: str
) -> None:
    good, artifact = workshop.good(fault.good), workshop.artifact(fault.good, format_name)
    faulty = fault.plants[format_name](good, artifact, tmp_path / "faulty")
    found = verify(good, faulty, format_name)
    failed = {check.name for check in found.checks if not check.passed}
    assert set(fault.caught_by) <= failed, found.checks


@pytest.mark.parametrize("fault", OF_THE_MODEL, ids=[_names(f) for f in OF_THE_MODEL])
def test_a_fault_of_the_model_moves_its_logits(workshop: Workshop, fault: Fault) -> None:
    assert fault.distance is not None
    assert fault.distance(workshop.good(fault.good)) > LEAST_EFFECT


@pytest.mark.parametrize("format_name", ALL)
def test_truncated_weights_are_refused(
    workshop: Workshop, tmp_path: Path, format_name: str
) -> None:
    good = workshop.good("llama/float")
    artifact = export(good.rung.student, tmp_path / "artifact", format_name)
    weights = artifact / WEIGHTS[format_name]
    whole = weights.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 4096, 100):
        weights.write_bytes(whole[:kept])
        with pytest.raises(InputError):
            verify(good, artifact, format_name)


def test_there_are_enough_faults_and_each_has_its_name() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    in_all = [fault for fault in FAULTS if set(fault.plants) == set(ALL)]
    assert len(in_all) >= 25


def test_a_check_that_is_not_there_does_not_count_as_having_caught(workshop: Workshop) -> None:
    """The table names checks that exist: else a fault would be caught by nobody in silence."""
    existing: set[str] = set()
    both = [(name, f) for name, f in MADE if name in ("llama/float", "gemma3/float")]
    for name, format_name in both:
        artifact = workshop.artifact(name, format_name)
        found = verify(workshop.good(name), artifact, format_name)
        existing |= {check.name for check in found.checks}
    assert {name for fault in FAULTS for name in fault.caught_by} <= existing
