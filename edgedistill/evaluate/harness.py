"""Tasks of lm-evaluation-harness as suites: ``lm_eval:TASK``, or ``lm_eval:DIR/TASK`` for own ones.

The harness makes the prompts, asks a session through :class:`harness_model.SessionLM` and computes
its own metric of every document, which becomes the grade of a case: so paired statistics, slices (a
group's subtasks) and the floor apply to its tasks as to any suite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgedistill.chat import Chat
from edgedistill.errors import InputError, UnavailableError, UsageError
from edgedistill.evaluate.score import Answer, Score, TextBits, refuse_other_tokens, write_scores
from edgedistill.evaluate.suite import SUITE_FILE, Case, GenerateCase, Message, TextCase
from edgedistill.plugins import load_runtime
from edgedistill.session import Session

PREFIX = "lm_eval:"
# Per document: (log-likelihood in nats, bytes).
BYTE_METRICS = ("bits_per_byte", "byte_perplexity")


class HarnessTask(BaseModel):
    """A task, or a group of them, by name.

    Attributes:
        directory: of YAML files that define tasks of one's own, with their data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    directory: Path | None = None


def find_task(suite: Sequence[Path]) -> HarnessTask | None:
    """The task that a suite names; None for files of cases.

    Raises:
        UsageError: a task beside other suites, or no name, or no such directory.
    """
    named = [str(path) for path in suite if str(path).startswith(PREFIX)]
    if not named:
        return None
    directory, _, name = named[0].removeprefix(PREFIX).rpartition("/")
    if len(suite) > 1 or not name:
        raise UsageError(
            f"--suite {named[0]}: a task of lm-evaluation-harness is a suite of its own",
            hint=f"name one task, as {PREFIX}hellaswag",
        )
    if directory and not Path(directory).is_dir():
        raise UsageError(f"--suite {named[0]}: there is no directory {directory}")
    return HarnessTask(name=name, directory=Path(directory).absolute() if directory else None)


def score_task(
    artifact: Path,
    runtime: str,
    student: Path,
    task: HarnessTask,
    dst: Path,
    *,
    sample: int | None,
    chat: Chat,
    threads: int,
    context_tokens: int,
    kv_cache_bits: int | None = None,
) -> None:
    """Run a task on an artifact; writes ``suite.jsonl`` and what ``score_artifact`` writes.

    The student's chat template renders the prompts, where it has one.

    Args:
        artifact: a directory that the runtime opens.
        runtime: file name of the runtime, without ``.py``.
        student: its tokenizer and chat template make the prompts.
        task: of the harness.
        dst: an empty directory.
        sample: the first so many documents of each subtask; None takes all.
        chat: the fixed part of the conversation.
        threads: of the runtime.
        context_tokens: what the artifact claims.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.

    Raises:
        InputError: there is no such task, its data are missing, or its metric has no grade.
        UnavailableError: lm-evaluation-harness is not installed, or a hub cannot be reached.
    """
    _require_harness()
    program = load_runtime(runtime, kv_cache_bits)
    started = time.monotonic()
    with program.open(artifact, context_tokens=context_tokens, threads=threads) as session:
        refuse_other_tokens(session, student)
        samples = _run(session, student, task, sample, chat)
    scored = dict(_cases(samples))
    if not scored:
        raise InputError(f"the task {task.name} has no documents")
    by_id = {case.id: score for case, score in scored.values()}
    cases = [case for case, _ in scored.values()]
    lines = (case.model_dump_json(exclude_unset=True) + "\n" for case in cases)
    (dst / SUITE_FILE).write_text("".join(lines), encoding="utf-8")
    write_scores(dst, cases, by_id, seconds=time.monotonic() - started)


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"lm-evaluation-harness is not installed ({error})",
            hint="pip install 'edgedistill[lm-eval]'",
        ) from error


def _run(
    session: Session, student: Path, task: HarnessTask, sample: int | None, chat: Chat
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Subtask -> what the harness has to say of each document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from edgedistill.evaluate.harness_model import SessionLM

    manager = TaskManager(include_path=str(task.directory) if task.directory else None)
    if task.name not in manager.all_tasks:
        raise InputError(f"lm-evaluation-harness has no task {task.name!r}")
    model = SessionLM(session, student, chat)
    try:
        results = simple_evaluate(
            model=model,
            tasks=[task.name],
            task_manager=manager,
            limit=sample,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=bool(model.tokenizer.chat_template),
        )
    except (OSError, ConnectionError) as error:
        raise UnavailableError(
            f"the data of the task {task.name} cannot be had ({type(error).__name__}: {error})",
            hint="check the network, or define the task with local files",
        ) from error
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = results["samples"]
    return samples


def _cases(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Iterator[tuple[str, tuple[Case, Score]]]:
    """(id, case with its score) of each document, by the first metric that gives a grade."""
    for subtask, documents in samples.items():
        if not documents:
            continue
        metric = _metric(subtask, documents)
        first_filter = documents[0].get("filter")
        for document in documents:
            if document.get("filter") != first_filter:
                continue  # the same document through another filter
            case_id = f"{subtask}-{document['doc_id']}"
            yield case_id, _case(case_id, subtask, document, document[metric])


def _metric(subtask: str, documents: Sequence[Mapping[str, Any]]) -> str:
    names: Sequence[str] = documents[0]["metrics"]
    for name in names:
        if name in BYTE_METRICS or all(_is_grade(document.get(name)) for document in documents):
            return name
    raise InputError(
        f"no metric of the task {subtask} ({', '.join(names)}) grades a document from 0 to 1",
        hint="choose a task with accuracy, exact match or bits per byte",
    )


def _is_grade(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0.0 <= value <= 1.0


def _case(
    case_id: str, subtask: str, document: Mapping[str, Any], value: Any
) -> tuple[Case, Score]:
    prompt = str(document["arguments"][0][0])
    if isinstance(value, tuple | list):
        nats, size_bytes = value
        text = TextCase(id=case_id, kind="text", slices=(subtask,), text=prompt)
        bits = -float(nats) / math.log(2.0)
        return text, TextBits(bits / int(size_bytes), int(size_bytes))
    case = GenerateCase(
        id=case_id,
        kind="generate",
        slices=(subtask,),
        messages=(Message(role="user", content=prompt),),
        exact=(str(document["target"]) or "-",),
    )
    return case, Answer(str(document["filtered_resps"]), float(value))
