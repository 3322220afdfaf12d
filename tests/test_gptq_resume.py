"""GPTQ that is interrupted, at every matrix and between, ends in the bytes of one that was not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill import grid_damage, student
from edgedistill.gptq import Gptq
from edgedistill.gptq_state import STATE_FILE, GptqState
from edgedistill.hidden_stream import HiddenStream
from edgedistill.plugins import load_plugin
from edgedistill.stage import Stage

Tiny = Callable[[str], Path]
LINEARS = 7
BLOCKS = 3


class Interruption:
    """Raises ``KeyboardInterrupt`` in the place of some call of a function, until it is lifted.

    Attributes:
        taken: calls since the start, or since it was lifted.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, after: int
    ) -> None:
        self.taken, self.after = 0, after
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.taken == self.after:
                raise KeyboardInterrupt
            self.taken += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def lift(self) -> None:
        """Let everything run, and count anew."""
        self.taken, self.after = 0, -1


def gptq(**fields: Any) -> Stage:
    calibration = {"tokens": 2048, "sequence_tokens": 128}
    fields = {"bits": 4, "embeddings": {"bits": 4}, "calibration": calibration, **fields}
    return load_plugin("stages", "quantize_gptq").model_validate(fields)


def run(stage: Stage, src: Path, dst: Path, work: Path) -> None:
    dst.mkdir()
    work.mkdir(exist_ok=True)
    stage.run_beside(src, dst, teacher=None, work=work)


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def bytes_in(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*"))


def whole_run(stage: Stage, src: Path, dst: Path) -> dict[str, bytes]:
    dst.mkdir()
    stage.run(src, dst)
    return tree(dst)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_interruption_at_any_matrix_costs_its_block_and_changes_no_byte(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(student, "SHARD_BYTES", 20_000)  # several shards, and not at blocks' ends
    expected = whole_run(gptq(), tiny(family), tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 2
    for after in (0, 1, 4, LINEARS, LINEARS + 1, 2 * LINEARS, BLOCKS * LINEARS):
        work = tmp_path / f"work-{after}"
        with monkeypatch.context() as patch:
            cut = Interruption(patch, Gptq, "quantize", after=after)
            with pytest.raises(KeyboardInterrupt):
                run(gptq(), tiny(family), tmp_path / f"cut-{after}", work)
            cut.lift()
            run(gptq(), tiny(family), tmp_path / f"resumed-{after}", work)
        # The head comes first; a block that was begun is done again.
        done = 1 + (after - 1) // LINEARS * LINEARS if after else 0
        assert cut.taken == 1 + BLOCKS * LINEARS - done
        assert tree(tmp_path / f"resumed-{after}") == expected


def test_an_interruption_while_states_move_on_changes_no_byte(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the batches, of either half of a block, have left when it comes."""
    stage = gptq(calibration={"tokens": 8192, "sequence_tokens": 128})
    expected = whole_run(stage, tiny("llama"), tmp_path / "whole")
    dst, work = tmp_path / "resumed", tmp_path / "work"
    # Three batches of two streams leave two halves of each of three blocks: 12 calls a block.
    for after, finished in ((3, 1), (6, 1), (7, 1), (11, 1), (13, 2), (20, 3)):
        with monkeypatch.context() as patch:
            Interruption(patch, HiddenStream, "leave", after=after)
            with pytest.raises(KeyboardInterrupt):
                run(stage, tiny("llama"), tmp_path / f"cut-{after}", work)
        assert GptqState(work).finished == finished  # embedding and head count as one
    run(stage, tiny("llama"), dst, work)
    assert tree(dst) == expected


def test_an_interruption_between_the_states_and_their_record_changes_no_byte(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_run(gptq(), tiny("llama"), tmp_path / "whole")
    work = tmp_path / "work"
    for after in range(3):
        with monkeypatch.context() as patch:
            Interruption(patch, Path, "rename", after=1)
            with pytest.raises(KeyboardInterrupt):
                run(gptq(), tiny("llama"), tmp_path / f"cut-{after}", work)
        assert GptqState(work).finished == after + 1
    run(gptq(), tiny("llama"), tmp_path / "resumed", work)
    assert tree(tmp_path / "resumed") == expected


def test_what_is_kept_is_one_generation_whatever_the_number_of_blocks(
    tiny: Tiny, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    run(gptq(), tiny("llama"), tmp_path / "out", work)
    tokens, hidden, streams, generations = 2048, 64, 2, 2
    states = [p for p in work.iterdir() if p.suffix == ".hidden"]
    assert sum(p.stat().st_size for p in states) == 4 * tokens * hidden * streams * generations
    assert bytes_in(work) < bytes_in(tmp_path / "out") + sum(p.stat().st_size for p in states)
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


@pytest.mark.parametrize("how", ["missing", "torn", "changed", "record"])
def test_state_that_is_not_whole_is_not_gone_on_from(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As a power cut may leave it."""
    expected = whole_run(gptq(), tiny("llama"), tmp_path / "whole")
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        Interruption(patch, Gptq, "quantize", after=1 + LINEARS)
        with pytest.raises(KeyboardInterrupt):
            run(gptq(), tiny("llama"), tmp_path / "cut", work)
    part, hidden = work / "part-1.safetensors", work / "calibrated-1.hidden"
    if how == "missing":
        part.unlink()
    elif how == "torn":
        os.truncate(part, part.stat().st_size // 2)
    elif how == "changed":
        states = np.fromfile(hidden, dtype=np.float32)
        states[7] += 1
        states.tofile(hidden)
    else:
        os.truncate(work / STATE_FILE, 40)
    assert GptqState(work).finished == 0
    run(gptq(), tiny("llama"), tmp_path / "again", work)
    assert tree(tmp_path / "again") == expected


def test_what_was_measured_for_mixed_bits_is_not_measured_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = {"tokens": 2048, "sequence_tokens": 128}
    fields = {"bits_per_weight": 5.0, "formats": ["gguf"], "calibration": calibration}
    stage = load_plugin("stages", "quantize_mixed").model_validate(fields)
    expected = whole_run(stage, tiny("llama"), tmp_path / "whole")
    measured = Interruption(monkeypatch, grid_damage, "measure_damage", after=-1)
    with monkeypatch.context() as patch:
        Interruption(patch, HiddenStream, "leave", after=5)
        with pytest.raises(KeyboardInterrupt):
            run(stage, tiny("llama"), tmp_path / "cut", tmp_path / "work")
    run(stage, tiny("llama"), tmp_path / "resumed", tmp_path / "work")
    assert measured.taken == 1
    assert tree(tmp_path / "resumed") == expected
