"""The benchmark: its definitions on a clock of our own, its figures on real runtimes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.bench import machine, measure, protocol
from edgedistill.bench.measure import Job, Measured, Request
from edgedistill.bench.prompt import Prompter
from edgedistill.bench.roofline import (
    bytes_per_token,
    decode_roofline_share,
    read_bandwidth_gb_per_s,
)
from edgedistill.errors import InputError, StageError, UsageError
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid
from edgedistill.results import Bench
from edgedistill.session import Logits, Session
from edgedistill.student import Student

RUNTIMES = {"gguf": "llama_cpp", "onnx": "onnx_runtime"}
SPECIAL = 1  # <|im_start|> of the tiny tokenizer


@pytest.fixture(scope="module")
def student(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a format to the tiny student in it."""
    made: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form)
            load_plugin("exporters", form)().export(
                Student(student), made[form], context_tokens=256
            )
        return made[form]

    return make


class ClockedSession(Session):
    """Spends 100 ms on each prefill and 10 ms on each step, of the clock that it moves."""

    def __init__(self, clock: list[float], answers: Sequence[int] = (7,)) -> None:
        self.vocab_size, self.context_tokens, self.position = 512, 4096, 0
        self.stepped: list[int] = []
        self._clock = clock
        self._answers = list(answers)

    def prefill(self, ids: Sequence[int]) -> Logits:
        self._clock[0] += 0.100
        return self._append(ids)

    def step(self, token: int) -> Logits:
        self._clock[0] += 0.010
        self.stepped.append(token)
        return self._append([token])

    def _append(self, ids: Sequence[int]) -> Logits:
        self.position += len(ids)
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[self._answers[min(len(self.stepped), len(self._answers) - 1)]] = 1.0
        return logits

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        raise NotImplementedError

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_a_request_is_timed_by_the_definitions(clock: list[float]) -> None:
    session = ClockedSession(clock)
    request = measure._request(session, list(range(64)), decode_tokens=64)
    assert request.ttft_ms == pytest.approx(100.0)
    assert request.decode_tok_per_s == pytest.approx(100.0)  # (64 - 1) / (63 x 10 ms)
    assert session.position == 64 + 63


def test_decoding_is_greedy(clock: list[float]) -> None:
    session = ClockedSession(clock, answers=[5, 9, 4, 3])
    measure._request(session, [1, 2], decode_tokens=5)
    assert session.stepped == [5, 9, 4, 3]


def test_user_time_runs_to_the_first_visible_text(clock: list[float], student: Path) -> None:
    prompter = Prompter(student)
    word = prompter.encode("fox")[0]
    prompt = prompter.user_prompt(64)
    assert prompt is not None
    shown = measure._user_times(ClockedSession(clock, [word]), prompter, prompt, 2)
    assert shown == pytest.approx([100.0, 100.0])
    late = ClockedSession(clock, [SPECIAL, SPECIAL, word])
    assert measure._answers(late, prompter, prompt.text)
    assert late.stepped == [SPECIAL, SPECIAL]


def test_a_model_that_shows_nothing_has_no_user_time(clock: list[float], student: Path) -> None:
    prompter = Prompter(student)
    prompt = prompter.user_prompt(64)
    assert prompt is not None
    assert measure._user_times(ClockedSession(clock, [SPECIAL]), prompter, prompt, 2) == []


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_an_artifact_is_measured_in_its_real_runtime(
    exported: Callable[[str], Path], student: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(protocol, "ATTEMPTS", 1)
    artifact = exported(form)
    weight_bytes = load_plugin("exporters", form)().weight_bytes(artifact)
    bench = protocol.bench_artifact(
        artifact,
        RUNTIMES[form],
        student=student,
        threads=1,
        context_tokens=256,
        weight_bytes=weight_bytes,
    )
    assert {n: len(t.raw) for n, t in bench.ttft_model_ms.items()} == {64: 5, 192: 3}
    assert {n: len(t.raw) for n, t in bench.decode_tok_per_s.items()} == {64: 5, 192: 3}
    for n, ttft in bench.ttft_model_ms.items():
        assert min(ttft.raw) > 0
        assert ttft.p50 <= ttft.p95 <= max(ttft.raw)
        prefill = bench.prefill_tok_per_s[n]
        assert prefill.raw == pytest.approx([1e3 * n / t for t in ttft.raw])
        assert prefill.p95 <= prefill.p50
    baseline = int(bench.settings["baseline_rss_bytes"])
    assert baseline < bench.peak_rss_bytes < 2e9
    assert bench.memory_bandwidth_gb_per_s > 0
    assert 0 < bench.cpu_share <= 1.05
    assert bench.accepted == (bench.reason == "")
    assert bench.settings["decode_tokens"] == "64"
    assert Bench.model_validate_json(bench.model_dump_json()) == bench


def test_a_runtime_that_is_no_device_is_not_timed(student: Path) -> None:
    if sys.platform == "darwin":
        pytest.skip("Core ML runs here")
    reason = protocol.can_bench("core_ml")
    assert reason
    assert protocol.can_bench("llama_cpp") is None
    with pytest.raises(UsageError, match="core_ml cannot be benchmarked"):
        protocol.bench_artifact(
            student, "core_ml", student=student, threads=1, context_tokens=256, weight_bytes=1
        )


def test_an_error_of_the_measuring_process_is_raised_here(student: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03")
    for artifact in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as caught:
            protocol.bench_artifact(
                artifact,
                "llama_cpp",
                student=student,
                threads=1,
                context_tokens=256,
                weight_bytes=1,
            )
        assert str(tmp_path) in str(caught.value.where)


def test_a_measuring_process_that_dies_is_a_failed_step(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = protocol.plan_job(student, "llama_cpp", student, threads=1, context_tokens=256)
    with pytest.raises(StageError, match="ended with status 1"):
        protocol._run(job)


@pytest.mark.parametrize(
    ("context", "repeats", "decode"),
    [
        (4096, {64: 5, 512: 3}, 64),
        (576, {64: 5, 512: 3}, 64),
        (256, {64: 5, 192: 3}, 64),
        (80, {40: 5}, 40),
    ],
)
def test_prompts_are_cut_to_the_context(
    tmp_path: Path, context: int, repeats: dict[int, int], decode: int
) -> None:
    job = protocol.plan_job(tmp_path, "llama_cpp", tmp_path, threads=1, context_tokens=context)
    assert job.repeats == repeats
    assert job.decode_tokens == decode
    assert max(job.repeats) + job.decode_tokens <= context


def test_a_context_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="16 tokens is too short"):
        protocol.plan_job(tmp_path, "llama_cpp", tmp_path, threads=1, context_tokens=16)


def job_of(path: Path, threads: int = 2) -> Job:
    return protocol.plan_job(path, "llama_cpp", path, threads=threads, context_tokens=256)


def measured(cpu_seconds: float = 3.9, **changes: Any) -> Measured:
    requests = {
        64: [Request(ttft_ms=t, decode_tok_per_s=100.0) for t in (50, 51, 50, 52, 49)],
        192: [Request(ttft_ms=t, decode_tok_per_s=90.0) for t in (150, 151, 149)],
    }
    fields: dict[str, Any] = {
        "requests": requests,
        "user_prompt_tokens": {64: 64, 192: 191},
        "ttft_user_ms": {64: [51.0, 52.0]},
        "ttft_cold_ms": [],
        "cpu_seconds": cpu_seconds,
        "wall_seconds": 2.0,
        "baseline_rss_bytes": 1,
        "peak_rss_bytes": 2,
        "settings": {"version": "1"},
    }
    return Measured(**(fields | changes))


def test_a_quiet_run_is_accepted(tmp_path: Path) -> None:
    bench = protocol.summarize(job_of(tmp_path), measured(), 20.0, 100_000_000, {"load": "0.1"})
    assert bench.accepted
    assert bench.reason == ""
    assert bench.cpu_share == pytest.approx(3.9 / (2.0 * 2))
    assert bench.decode_roofline_share == pytest.approx(100.0 / (20e9 / 100e6))
    assert bench.ttft_model_ms[64].p50 == 50
    assert bench.ttft_cold_ms is None
    assert bench.settings["load"] == "0.1"


@pytest.mark.parametrize(
    ("changes", "bandwidth", "reason"),
    [
        ({"cpu_seconds": 3.5}, 20.0, "the machine was busy: the run got 88% "),
        ({}, 9.9, "decoding at 101% of what memory bandwidth allows is impossible"),
        (
            {"requests": {64: [Request(ttft_ms=t, decode_tok_per_s=9.0) for t in (50, 56)]}},
            20.0,
            "TTFT after 64 tokens varied by 11%",
        ),
        (
            {"requests": {64: [Request(ttft_ms=9, decode_tok_per_s=r) for r in (50, 56)]}},
            20.0,
            "decode rate after 64 tokens varied by 11%",
        ),
    ],
)
def test_a_run_that_cannot_be_trusted_is_marked(
    tmp_path: Path, changes: dict[str, Any], bandwidth: float, reason: str
) -> None:
    bench = protocol.summarize(job_of(tmp_path), measured(**changes), bandwidth, 100_000_000, {})
    assert not bench.accepted
    assert reason in bench.reason
    assert ";" not in bench.reason  # and nothing else is objected to


def test_a_busy_run_is_repeated_until_one_is_accepted(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [measured(cpu_seconds=3.0), measured(), measured(cpu_seconds=3.0)]
    monkeypatch.setattr(protocol, "_run", lambda job: runs.pop(0))
    monkeypatch.setattr(protocol, "read_bandwidth_gb_per_s", lambda threads: 20.0)

    def bench() -> Bench:
        return protocol.bench_artifact(
            student,
            "llama_cpp",
            student=student,
            threads=2,
            context_tokens=256,
            weight_bytes=100_000_000,
        )

    first = bench()
    assert first.accepted
    assert first.settings["attempt"] == "2 of 3"
    assert len(runs) == 1
    runs += [measured(cpu_seconds=3.0)] * 2
    last = bench()
    assert not last.accepted
    assert last.settings["attempt"] == "3 of 3"
    assert runs == []
    runs += [measured(cpu_seconds=1.0), measured()]
    assert not bench().accepted
    assert len(runs) == 1


def test_p95_is_the_slow_tail_of_times_and_of_rates() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 101.0]
    assert protocol.timing(values).p95 == pytest.approx(np.percentile(values, 95))
    assert protocol.rate_timing(values).p95 == pytest.approx(np.percentile(values, 5))
    assert protocol.timing(values).p50 == protocol.rate_timing(values).p50 == 3.0
    assert protocol.rate_timing(values).raw == values


def test_prompts_are_rendered_and_cut_as_transformers_does(student: Path) -> None:
    from transformers import AutoTokenizer

    judge = AutoTokenizer.from_pretrained(str(student))
    prompter = Prompter(student)
    for text in ("Hello 123", "two\nlines <|im_end|>", "naïve 你好 🙂"):
        rendered = judge.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert prompter.render(text) == rendered
        assert prompter.encode(rendered) == judge(rendered, add_special_tokens=False).input_ids


def test_templates_see_the_special_tokens_and_blocks_are_trimmed(
    student: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    template = (
        "{{ bos_token }}\n  {% for m in messages %}\n[{{ m.role }}] {{ m.content | trim }}"
        "{% if loop.first %}{% continue %}{% endif %}never\n  {% endfor %}\n{{ eos_token }}"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((student / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    judge = AutoTokenizer.from_pretrained(str(tmp_path))
    conversation = [{"role": "user", "content": " hello "}]
    expected = judge.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert Prompter(tmp_path).render(" hello ") == expected


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ a.b.c }}", "{{ 'a' + 1 }}"]
)
def test_a_template_that_fails_is_an_input_error(
    student: Path, tmp_path: Path, template: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((student / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="its chat template"):
        Prompter(tmp_path).render("x")


def test_prompts_have_the_length_that_is_asked(student: Path) -> None:
    prompter = Prompter(student)
    for tokens in (1, 64, 512, 3000):
        assert len(prompter.exact_ids(tokens)) == tokens
    prompt = prompter.user_prompt(512)
    assert prompt is not None
    assert prompt.tokens == len(prompter.encode(prompter.render(prompt.text)))
    assert 480 <= prompt.tokens <= 512
    assert prompter.user_prompt(2) is None  # the template alone has more


def test_what_counts_as_visible(student: Path) -> None:
    prompter = Prompter(student)
    emoji = prompter.encode("🙂")
    assert not prompter.is_visible([SPECIAL])
    assert not prompter.is_visible(prompter.encode("   \n"))
    assert prompter.is_visible(prompter.encode("a"))
    assert prompter.is_visible(emoji)
    byte = prompter.encode("🦤")[:1]  # unseen in training: the first of four bytes
    assert not prompter.is_visible(byte)


def test_a_student_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Prompter(tmp_path)


def test_a_decode_step_reads_all_weights_and_its_cache(tiny: Callable[[str], Path]) -> None:
    tied = Student(tiny("llama")).facts
    cache = 3 * 2 * 2 * 16 * 2  # layers x (keys, values) x heads x width x float16
    assert bytes_per_token(tied, {}, 1_000_000, 0) == 1_000_000
    assert bytes_per_token(tied, {}, 1_000_000, 100) == 1_000_000 + 100 * cache


def test_a_layer_that_slides_reads_its_window_alone(tiny: Callable[[str], Path]) -> None:
    facts = Student(tiny("gemma3")).facts  # two of three layers see 16 tokens
    token = 2 * 2 * 32 * 2  # (keys, values) x heads x width x float16
    assert bytes_per_token(facts, {}, 1_000_000, 10) == 1_000_000 + 3 * 10 * token
    assert bytes_per_token(facts, {}, 1_000_000, 100) == 1_000_000 + (100 + 2 * 16) * token


def test_an_embedding_of_its_own_is_not_read(tiny: Callable[[str], Path]) -> None:
    untied = Student(tiny("mistral")).facts
    whole = untied.parameters * 2
    rows, columns = untied.vocab_size, untied.hidden_size
    assert bytes_per_token(untied, {}, whole, 0) == whole - (rows - 1) * columns * 2
    assert bytes_per_token(untied, {}, 2 * whole, 0) == 2 * (whole - (rows - 1) * columns * 2)
    grids = {name: Grid(8, 32) for name in untied.matrices()}
    less = whole - bytes_per_token(untied, grids, whole, 0)
    assert less == int((rows - 1) * columns * 8.5 / 8)


def test_roofline_share() -> None:
    assert decode_roofline_share(100.0, 10.0, 100_000_000) == pytest.approx(1.0)


def test_bandwidth_is_of_memory_and_of_all_threads() -> None:
    one = read_bandwidth_gb_per_s(1, array_bytes=32 * 2**20)
    two = read_bandwidth_gb_per_s(2, array_bytes=32 * 2**20)
    assert 0.1 < one < 2000
    assert 0.1 < two < 2000


def test_peak_memory_is_not_inherited_from_the_parent() -> None:
    held = np.ones(300_000_000, dtype=np.uint8)
    code = "from edgedistill.bench.measure import _peak_rss_bytes as p; print(p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert 10_000_000 < int(done.stdout) < held.nbytes
    code = f"import numpy as n; n.ones(200_000_000, n.uint8)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(done.stdout) > 200_000_000


def test_the_machine_is_described_and_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    described = machine.describe_machine()
    assert all(described.values())
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    identity = machine.fingerprint()
    assert len(identity) == 64
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 98.0, 97.0))
    assert machine.describe_machine()["load"].startswith("99")
    assert machine.fingerprint() == identity
    monkeypatch.setattr(machine, "_cpu_model", lambda: "another")
    assert machine.fingerprint() != identity
