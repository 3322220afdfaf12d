"""Our sessions as a model of lm-evaluation-harness, whose tasks then run on the exported file.

The requests are those of its Hugging Face model (https://github.com/EleutherAI/lm-evaluation-harness):
a continuation is what follows the context's ids in the ids of both, no special tokens are added, a
context that is too long loses its beginning.  The tests hold both to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgedistill.chat import Chat
from edgedistill.errors import StageError, UsageError
from edgedistill.evaluate.generate import Voice, write_answer
from edgedistill.evaluate.score import log_softmax
from edgedistill.progress import progress_bar
from edgedistill.session import Logits, Session
from edgedistill.verify.prompts import common_prefix

ANSWER_TOKENS = 256  # where a task does not say how long an answer may be, as the harness has it


class SessionLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A session with the tokenizer and the chat template of a student.

    Args:
        session: of any runtime; the caller closes it.
        student: whose tokenizer makes the ids.
        chat: the system message and the template's arguments of every conversation.
    """

    def __init__(self, session: Session, student: Path, chat: Chat) -> None:
        super().__init__()
        self._session = session
        self._chat = chat
        self._name = student.name
        self._voice = Voice.of(student, chat)
        self._cached: tuple[int, ...] = ()
        self.tokenizer = self._voice.tokenizer
        self.max_length = session.context_tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that stands alone."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own cache."""
        return self._name

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Ids of a text; special tokens in it are parsed, none is added."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt its last message is open."""
        turns = list(chat_history)
        if self._chat.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._chat.system})
        text = self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat.template_args,
        )
        return str(text)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context, in nats."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy) of each (_, context ids, continuation ids)."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i][1:])
        with progress_bar(len(order), "lm-eval: scoring") as bar:
            for i in order:
                _, context, continuation = requests[i]
                found[i] = self._continue(context, continuation)
                bar.advance()
        return [found[i] for i in range(len(requests))]

    def _continue(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens does not fit into {self.max_length}"
            )
        nats, greedy, position = 0.0, True, 0
        logits = self._after(context[-room:])
        later = continuation[:-1]
        chunks = self._session.stream_logits(later) if later else iter(())
        for chunk in chain([logits[None]], chunks):
            for row, log_probs in zip(chunk, log_softmax(chunk), strict=True):
                token = continuation[position]
                nats += float(log_probs[token])
                greedy = greedy and int(row.argmax()) == token
                position += 1
        self._cached += tuple(later)
        if not np.isfinite(nats):
            raise StageError("the log-probabilities are not finite: the artifact is damaged")
        return nats, greedy

    def _after(self, ids: Sequence[int]) -> Logits:
        """The logits after ``ids``; what the cache has of them is not computed again."""
        keep = min(common_prefix(self._cached, ids), len(ids) - 1)
        self._session.rewind(keep)
        self._cached = tuple(ids)
        return self._session.prefill(ids[keep:])

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each to the first of its stop texts or the end of the turn.

        Raises:
            UsageError: a task that samples.
        """
        asked = [
            (self.tok_encode(context) or [self.prefix_token_id], options)
            for context, options in _args(requests)
        ]
        found: dict[int, str] = {}
        with progress_bar(len(asked), "lm-eval: answering") as bar:
            for i in sorted(range(len(asked)), key=lambda i: asked[i][0]):
                ids, options = asked[i]
                found[i] = self._answer(ids, options)
                bar.advance()
        return [found[i] for i in range(len(asked))]

    def _answer(self, ids: list[int], options: dict[str, Any]) -> str:
        if options.get("do_sample") or float(options.get("temperature") or 0.0) > 0.0:
            raise UsageError(
                "the task samples its answers, which no two runs give alike",
                hint="choose a task that generates greedily",
            )
        most = int(options.get("max_gen_toks", ANSWER_TOKENS))
        until = options.get("until") or []
        if most >= self.max_length:
            raise UsageError(
                f"an answer of {most} tokens leaves no room in a context of {self.max_length}",
                hint="give more --context-tokens",
            )
        logits = self._after(ids[-(self.max_length - most) :])
        return write_answer(
            self._session,
            logits,
            self._voice,
            max_tokens=most,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            name="of the task",
        )


def _args(requests: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    return [request.args for request in requests]
