"""Heal a pruned student: it learns to predict what its teacher predicts, or was recorded with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from edgedistill.decoder import DecoderFacts
from edgedistill.distilling_stage import DistillingStage
from edgedistill.errors import EdgedistillError, InputError
from edgedistill.on_policy import writing_cost
from edgedistill.stage import Stage, StageCost
from edgedistill.student import Student

if TYPE_CHECKING:
    from edgedistill.distill import DistillSettings
    from edgedistill.team import Team
    from edgedistill.training_text import TrainingSplit

# Small beside those of training from nothing: few steps, on a student that mostly works.
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3, "norms": 3e-3}


class Heal(DistillingStage, Stage):
    """Distil the teacher's logits into a float student, usually one that was pruned.

    The weights of the least held-out KL are written, and ``healing.json`` with the curve.  A run
    that is killed goes on from its last evaluation, to the same bytes.

    Attributes:
        teacher: a student directory with the same tokenizer; by default the reference, which is
            the student with its adapters before anything was pruned or quantized.
        data: the text to train on, of the formats of ``calibration.file``, which is the default.
        recorded: a file of a teacher's answers, which are learned in place of a live teacher's
            logits: conversations, each with its answer, or with the ids of the answer and the
            likeliest ids in the place of each (``edgedistill record`` writes it).
        reasoning: how an answer is written behind its ``reasoning``, where a line has one, such as
            ``"<think>{reasoning}</think>{answer}"``; by default reasoning is left out.
        trained: ``full`` trains every tensor, ``lora`` products of low rank that are merged
            afterwards, ``norms`` norms and biases alone.
        rank: of the products.
        next_token_weight: of the plain next-token loss, added to the KL.
        answer_weight: of a position that predicts a token of an answer, where others count 1.
        hidden_weight: of 1 - cosine between the last hidden states, added to the KL.
        tail_power: how much earlier lines of rare ``slices`` are read: with odds of
            ``count ** -tail_power``.
        on_policy: share of the sequences whose second half is what the student itself writes at
            that moment, sampled at temperature 1; the teacher's logits are learned on it as on any
            text.
    """

    teacher: Path | None = None
    data: Path | None = None
    recorded: Path | None = None
    reasoning: str | None = None
    trained: Literal["full", "lora", "norms"] = "full"
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    next_token_weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    answer_weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    hidden_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    tail_power: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    @property
    def wants_teacher(self) -> bool:
        """Unless the recipe names one, or a record."""
        return self.teacher is None and self.recorded is None

    def cost(self, facts: DecoderFacts) -> StageCost:
        """As of every training, and of what the student writes.

        Of what is trained also gradient, two moments, the best so far.
        """
        copies = 5 if self.trained == "full" else 1
        writing = writing_cost(
            facts,
            self.on_policy,
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            sequence_tokens=self.calibration.sequence_tokens,
        )
        return self.training_cost(
            facts,
            copies=copies,
            teacher=self.recorded is None,
            whole=self.trained == "full",
            writing=writing,
        )

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A quantized student; a teacher of another vocabulary; products that are no smaller."""
        if quantized:
            return ["the student is quantized already: heal it before"]
        problems = self._contradictions() + self.too_many_processes()
        if self.trained == "lora" and self.rank > min(facts.hidden_size, facts.ffn_size):
            problems.append(f"rank: {self.rank} is more than the student's matrices have")
        if self.teacher is not None:
            try:
                teacher = Student(self.teacher).facts
            except EdgedistillError as error:
                return [*problems, f"teacher: {error}"]
            if teacher.vocab_size != facts.vocab_size:
                problems.append(
                    f"teacher: it knows {teacher.vocab_size} tokens, the student {facts.vocab_size}"
                )
            if self.hidden_weight and teacher.hidden_size != facts.hidden_size:
                problems.append(
                    f"hidden_weight: the teacher's states have {teacher.hidden_size} numbers, "
                    f"the student's {facts.hidden_size}"
                )
        return problems

    def _contradictions(self) -> list[str]:
        """Fields that cannot be stated together."""
        if self.recorded is None:
            return []
        stated = {
            "teacher": self.teacher is not None,
            "data": self.data is not None,
            "temperature": self.temperature != 1.0,
            "next_token_weight": self.next_token_weight != 0.0,
            "answer_weight": self.answer_weight != 1.0,
            "hidden_weight": self.hidden_weight != 0.0,
            "on_policy": self.on_policy != 0.0,
        }
        return [
            f"{name}: means nothing beside `recorded`" for name, is_set in stated.items() if is_set
        ]

    def run(self, src: Path, dst: Path) -> None:
        """Heal with the teacher that the stage names.

        Raises:
            InputError: it names none; or text, teacher and student do not go together.
            StageError: the held-out KL did not fall.
        """
        self.run_beside(src, dst, teacher=None, work=None)

    def train(
        self, team: Team, *, src: Path, dst: Path, teacher: Path | None, work: Path | None
    ) -> None:
        """Heal with the stage's own teacher, or else the given one."""
        from edgedistill.distill import Distillation
        from edgedistill.healing_results import Healing
        from edgedistill.student import StudentWriter
        from edgedistill.trainable_decoder import TrainableDecoder

        student = Student(src)
        taught_by = None if self.recorded else self._teacher(student, self.teacher or teacher)
        text = self._text(src)
        decoder = TrainableDecoder(
            student, self.trained, self.rank, self.calibration.seed, team.device
        )
        run = Distillation(decoder, taught_by, self._settings(), work, team)
        state = run.train(text.fitting, text.held_out)
        if not team.leads:
            return
        with StudentWriter(dst, student) as writer:
            for name, values in decoder.merged():
                writer.write(name, values)
        Healing(
            trained=self.trained,
            parameters_trained=sum(tensor.numel() for tensor in decoder.trained()),
            **self.outcome(state, text),
        ).write(dst)

    def _teacher(self, student: Student, path: Path | None) -> Student:
        from edgedistill.kept_vocabulary import teacher_for

        if path is None:
            raise InputError("heal has no teacher", hint="give `teacher`, a student directory")
        teacher = teacher_for(student.path, path)
        own, other = student.facts.hidden_size, teacher.facts.hidden_size
        if self.hidden_weight and own != other:
            raise InputError(
                f"hidden_weight: the teacher's states have {other} numbers, the student's {own}",
                where=str(path),
            )
        return teacher

    def _text(self, src: Path) -> TrainingSplit:
        from edgedistill.training_text import Emphasis

        emphasis = Emphasis(
            self.answer_weight, self.tail_power, self.recorded is not None, self.reasoning
        )
        return self.training_text(src, emphasis, self.recorded or self.data)

    def _settings(self) -> DistillSettings:
        from edgedistill.distill_loss import LossSettings

        loss = LossSettings(self.temperature, self.next_token_weight, self.hidden_weight)
        rate = self.learning_rate or LEARNING_RATES[self.trained]
        return self.distill_settings(rate, loss, self.on_policy)
