"""A build of a tiny student with every long step, killed thirty times, against one that was not."""

from __future__ import annotations

import random
import signal
import time

import pytest

from edgedistill.errors import ExitCode
from tests.killed_build import KILLED, KilledBuild, Victims
from tests.recipes import write_recipe
from tests.tiny import write_student

KILLS = 30
RECIPE = """\
name: killed
student: {student}
context_tokens: 64
calibration: {{tokens: 4096, sequence_tokens: 128}}
rungs:
  small:
    - prune_width: {{ffn_size: 128}}
    - heal: {{trained: norms, learning_rate: 2e-4, batch_tokens: 512, tokens: 12288, evaluations: 6,
             held_out_tokens: 256}}
    - quantize_gptq: {{bits: 4, group_size: 32}}
    - recover: {{trained: scales, learning_rate: 2e-4, batch_tokens: 512, tokens: 12288,
                evaluations: 6, held_out_tokens: 256}}
export: [gguf]
build: {{threads: 1}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[KilledBuild, float]:
    """A build that nobody killed, and the seconds that it took."""
    directory = tmp_path_factory.mktemp("killed")
    shape = {"num_hidden_layers": 4, "intermediate_size": 192}
    student = write_student(directory / "student", "llama", **shape)
    write_recipe(directory, student, RECIPE)
    build, started = KilledBuild(directory, "whole"), time.monotonic()
    assert build.run() == ExitCode.OK, build.told
    return build, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_kills_at_random_moments_change_no_byte(whole: tuple[KilledBuild, float]) -> None:
    """Of all processes, of the parent alone, of the child alone."""
    reference, seconds = whole
    expected = reference.written()
    draw, kills, round_ = random.Random(0), 0, 0
    left: set[str] = set()
    while kills < KILLS:
        build = KilledBuild(reference.directory, f"round-{round_}")
        ended, starts = False, 0
        while not ended:
            victims: Victims = draw.choice(("all", "parent", "child"))
            if kills + build.kills < KILLS:
                code = build.run_and_kill(draw, victims, seconds)
            else:
                code = build.run()
            starts += 1
            assert starts < 2 * KILLS, "it does not get on"
            assert "Traceback" not in build.told
            assert code in (ExitCode.OK, -signal.SIGKILL) or (
                victims == "child" and KILLED in build.told
            ), build.told
            ended = code == ExitCode.OK
        assert build.written() == expected
        assert not list(build.cache.glob("work/*"))
        assert not list(build.cache.glob("scratch/*"))
        kills, round_ = kills + build.kills, round_ + 1
        left |= set(build.left)
    # What was gone on from: the state of training, and that of GPTQ.
    assert {"state.pt", "state.json"} <= left
