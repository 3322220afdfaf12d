"""Good artifacts raise no alarm: 200 and more, of shapes and seeds that set no threshold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgedistill.stage import Stage
from edgedistill.stages.quantize_rtn import QuantizeRtn
from tests.mutations import ALL
from tests.peaked import export, make_good, verify
from tests.tiny import EXPORTS

pytestmark = pytest.mark.slow

RUNGS: dict[str, Sequence[Stage]] = {
    "float": [],
    "int8": [QuantizeRtn(bits=8)],
    "int4": [QuantizeRtn(bits=4)],
}
# Seeds that no other test uses; heads, widths and depths that differ.
SHAPES: dict[int, dict[str, Any]] = {
    4101: {"num_hidden_layers": 3, "intermediate_size": 128},
    4102: {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2},
    4103: {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128},
    4104: {"num_key_value_heads": 1, "intermediate_size": 192, "rms_norm_eps": 1e-6},
    4105: {"num_hidden_layers": 5, "hidden_size": 96, "num_attention_heads": 6},
}
ARTIFACTS = len(EXPORTS) * len(SHAPES) * len(RUNGS)


def test_there_are_at_least_two_hundred() -> None:
    assert ARTIFACTS >= 200


@pytest.mark.parametrize("seed", SHAPES)
@pytest.mark.parametrize("family", dict.fromkeys(family for family, _ in EXPORTS))
def test_good_artifacts_raise_no_alarm(family: str, seed: int, tmp_path: Path) -> None:
    alarms = []
    for rung, good in make_good(tmp_path, family, RUNGS, seed, **SHAPES[seed]).items():
        for format_name in (name for name in ALL if (family, name) in EXPORTS):
            artifact = export(good.rung.student, tmp_path / f"{rung}-{format_name}", format_name)
            found = verify(good, artifact, format_name)
            alarms += [
                f"{rung}/{format_name} {check.name}: {check.value} against {check.limit}, "
                f"{check.detail}"
                for check in found.checks
                if not check.passed
            ]
    assert alarms == []
