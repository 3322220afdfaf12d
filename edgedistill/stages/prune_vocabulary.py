"""Drop the tokens that a domain never uses, with the tokenizer rebuilt and proven."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.progress import track
from edgedistill.stage import Stage
from edgedistill.student import Student

if TYPE_CHECKING:
    from edgedistill.bpe_vocabulary import BpeVocabulary
    from edgedistill.kept_vocabulary import Ids
    from edgedistill.pruning_results import DomainFertility
    from edgedistill.vocabulary_choice import Choice
    from edgedistill.vocabulary_proof import TextCount


class PruneVocabulary(Stage):
    """Keep the tokens of a domain; every other text can still be written, in more tokens.

    All of the texts is read.  What stays: every token that they use, what those are merged from,
    special and added tokens, the tokens of single bytes, and up to the size the most frequent
    others.  What is written is a plain checkpoint with a tokenizer of its own, and
    ``vocabulary_map.json``, by which later stages and the verification find the reference's ids.

    Attributes:
        vocab_size: tokens that stay, rounded up to ``multiple_of``.
        keep_share: the same as a share of those there are.
        least_count: a token that the texts use more rarely than that need not stay.
        multiple_of: that the size has to be; kernels of runtimes want 32 or 64.
        more: further texts whose tokens stay, of the formats of ``calibration.file``.
        second: text of another domain, on which the result is measured too.
        calibration: its ``file`` is the domain's text; from the recipe where it is not stated.
        chat: likewise.
    """

    vocab_size: Annotated[int, Field(ge=1)] | None = None
    keep_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    least_count: Annotated[int, Field(ge=1)] = 1
    multiple_of: Annotated[int, Field(ge=1)] = 64
    more: tuple[Path, ...] = ()
    second: Path | None = None
    calibration: Calibration = Calibration()
    chat: Chat = Chat()

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.vocab_size is None) == (self.keep_share is None):
            raise ValueError("give either vocab_size or keep_share")
        return self

    @property
    def needs_text(self) -> bool:
        """What the built-in texts lack is no reason to drop a token."""
        return True

    @property
    def prunes(self) -> bool:
        """It does."""
        return True

    @property
    def changes_vocabulary(self) -> bool:
        """Its student has token ids of its own."""
        return True

    def facts_after(self, facts: DecoderFacts) -> DecoderFacts:
        """So many tokens, rounded up."""
        wanted = self.vocab_size or math.ceil(facts.vocab_size * (self.keep_share or 1.0))
        rounded = math.ceil(wanted / self.multiple_of) * self.multiple_of
        return dataclasses.replace(facts, vocab_size=rounded)

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A quantized student; a size that is no smaller."""
        if quantized:
            return ["the student is quantized already: prune it before"]
        problems = []
        size = self.facts_after(facts).vocab_size
        if size >= facts.vocab_size:
            name = "vocab_size" if self.vocab_size else "keep_share"
            problems.append(
                f"{name}: {size} tokens (a multiple of {self.multiple_of}) are not below the "
                f"student's {facts.vocab_size}"
            )
        return problems

    def run(self, src: Path, dst: Path) -> None:
        """Count, choose, write, prove.

        Raises:
            InputError: the texts need more tokens; a tokenizer of another kind; a bad file.
            StageError: a token has another row than before, or the new tokenizer reads or writes
                a text differently.
        """
        from edgedistill.bpe_vocabulary import BpeVocabulary
        from edgedistill.pruning_results import PrunedVocabulary, Pruning, second_grows_more
        from edgedistill.tokenizer_files import stated_ids
        from edgedistill.vocabulary_choice import choose_tokens
        from edgedistill.vocabulary_proof import count_tokens, prove_rows, prove_tokenizer

        student = Student(src)
        self.refuse_misfit(student)
        facts, after = student.facts, self.facts_after(student.facts)
        vocabulary = BpeVocabulary(src)
        counted = count_tokens(src, self._files(), self.chat, facts.vocab_size)
        choice = choose_tokens(
            vocabulary,
            counted.counts,
            after.vocab_size,
            stated=stated_ids(src),
            least_count=self.least_count,
        )
        _write(student, dst, vocabulary, choice.kept)
        prove_rows(student, Student(dst), choice.kept)
        proven_on = prove_tokenizer(src, dst, choice.kept, self._read(), self.chat)
        fertility = self._fertility(src, dst, counted, choice)
        Pruning(
            stage="prune_vocabulary",
            parameters_before=facts.parameters,
            parameters_after=after.parameters,
            before={"vocab_size": facts.vocab_size},
            after={"vocab_size": after.vocab_size},
            losses=[],
            second_loses_more=second_grows_more(fertility),
            vocabulary=PrunedVocabulary(
                used=choice.used,
                merged_from=choice.merged_from,
                others=after.vocab_size - choice.used - choice.merged_from,
                split=choice.split,
                fertility=fertility,
                proven_on=proven_on,
            ),
        ).write(dst)

    def _files(self) -> tuple[Path, ...]:
        """The domain's texts, which tokens are chosen by."""
        if self.calibration.file is None:
            raise InputError("there is no text of the domain", hint="give calibration.file")
        return (self.calibration.file, *self.more)

    def _read(self) -> tuple[Path, ...]:
        """All texts that the stage reads."""
        return (*self._files(), *(() if self.second is None else (self.second,)))

    def _fertility(
        self, src: Path, dst: Path, counted: TextCount, choice: Choice
    ) -> list[DomainFertility]:
        from edgedistill.pruning_results import DomainFertility
        from edgedistill.vocabulary_proof import count_tokens

        def after(files: tuple[Path, ...]) -> TextCount:
            return count_tokens(dst, files, self.chat, len(choice.kept))

        found = [("calibration", counted, after(self._files()))]
        if self.second is not None:
            rows = len(counted.counts)
            second = count_tokens(src, (self.second,), self.chat, rows)
            found.append(("second", second, after((self.second,))))
        return [
            DomainFertility.model_validate(
                {
                    "domain": domain,
                    "characters": one.characters,
                    "tokens_before": one.tokens,
                    "tokens_after": other.tokens,
                    "per_character_before": one.tokens / one.characters,
                    "per_character_after": other.tokens / other.characters,
                }
            )
            for domain, one, other in found
        ]


def _write(student: Student, dst: Path, vocabulary: BpeVocabulary, kept: Ids) -> None:
    """The kept rows, the tokenizer's files, the config's ids, and the map of the vocabulary."""
    from edgedistill.kept_vocabulary import KeptVocabulary, NarrowedStudent, map_token_ids
    from edgedistill.student import StudentWriter
    from edgedistill.tokenizer_files import new_ids, write_tokenizer

    narrowed = NarrowedStudent(student.path, kept)
    config = map_token_ids(narrowed.config, new_ids(kept, str(student.path / "config.json")))
    with StudentWriter(dst, student, config) as writer:
        # What no fact names (a copy of a tied head, say) would keep its rows.
        for name in track(list(student.facts.tensor_shapes()), label="removing tokens"):
            writer.write(name, narrowed.read(name))
    write_tokenizer(student.path, dst, vocabulary, kept)
    KeptVocabulary.after(student.path, kept).write(dst)
