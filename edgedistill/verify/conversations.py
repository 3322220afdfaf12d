"""Conversations that templates and runtimes render differently: what was reported, and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgedistill.text_program import DirectoryText, Message, TextProgram, Tool
from edgedistill.verify.strings import HARD_STRINGS


@dataclass(frozen=True)
class Conversation:
    """A conversation to render.

    Attributes:
        name: what is hard about it.
        messages: as a chat template takes them.
        tools: JSON schemas of functions; None without any.
        answering: whether the text ends where the assistant's answer begins.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None = None
    answering: bool = True

    def render_by(self, program: TextProgram) -> str | None:
        """Its text by a program; None where the template refuses it."""
        return program.render(self.messages, self.tools, answering=self.answering)


def said(role: str, content: str, **more: Any) -> Message:
    """A message."""
    return {"role": role, "content": content, **more}


def user(*contents: str) -> tuple[Message, ...]:
    """Turns that alternate, the user's first."""
    roles = ("user", "assistant")
    return tuple(said(roles[i % 2], content) for i, content in enumerate(contents))


def system(content: str, *contents: str) -> tuple[Message, ...]:
    """The same behind a system message."""
    return (said("system", content), *user(*contents))


PLAIN = (
    Conversation("one message", user("Hello!")),
    Conversation("no answer asked for", user("Hello!"), answering=False),
    Conversation("two turns", user("Hi.", "Hello, how can I help?", "Tell me a joke.")),
    Conversation("closed turns", user("Hi.", "Hello, how can I help?"), answering=False),
    Conversation("eight turns", user(*(f"Turn {i}: {'word ' * i}." for i in range(1, 9)), "End.")),
    Conversation("system", system("Answer in one word.", "Which colour has the sky?")),
    Conversation("system, two turns", system("Be brief.", "One?", "Two.", "Three?")),
    Conversation("empty system", system("", "Hello!")),
    Conversation("system of blanks", system("  \n ", "Hello!")),
    Conversation("system in two lines", system("You are a clerk.\n\nYou never joke.", "Hi.")),
    Conversation("system alone", (said("system", "Be brief."),)),
    Conversation("system late", (*user("Hi.", "Hello."), said("system", "Be rude."), *user("So?"))),
    Conversation("two systems", (said("system", "One."), said("system", "Two."), *user("Hi."))),
    Conversation("assistant first", (said("assistant", "Welcome."), *user("Hi."))),
    Conversation("two users", (*user("First."), *user("Second."))),
    Conversation("two assistants", (*user("Hi.", "Yes?"), said("assistant", "Still here."))),
    Conversation("unknown role", (said("narrator", "It rained."), *user("Hi."))),
    Conversation("empty message", system("Answer anyway.", "")),
    Conversation("empty answer", user("Say nothing.", "", "Thanks.")),
    Conversation("blanks alone", user("   ")),
    Conversation("line breaks alone", user("\n\n")),
    Conversation("leading and trailing blanks", user("  mind the gap  ", "  sure \n", " ok ")),
    Conversation("leading and trailing lines", user("\n\nfirst\n\n", "\nsecond\n", "\nthird\n")),
    Conversation("tab and carriage return", user("a\tb\r\nc\rd")),
    Conversation("code", user("Fix:\n```python\ndef f(x):\n    return {'a': x[0]}\n```")),
    Conversation("JSON", user('Parse {"a": [1, 2.5e-3, null], "b": "\\"quoted\\" \\u00e9 \\\\"}')),
    Conversation("markup", user("<b>bold</b> &amp; <!-- comment --> <|not a token|> [INST] x")),
    Conversation("a template as text", user("{{ messages }} {% if true %}x{% endif %} {# no #}")),
    Conversation("quotes", user("\"double\" 'single' `back` „low“ «angle» \\backslash\\ /slash/")),
    Conversation("unicode", user("Größe, naïve, 你好，世界, שלום, नमस्ते, Ελλάδα, ½ ² ™ ①")),
    Conversation("emoji", user("🙂🎉👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷", "😀😀😀", "❤️ ok?")),
    Conversation("numbers", user("1234567890 3.14159 -12,345.67 1e-10 0x1F 2024-02-29 50%")),
    Conversation("long message", user("The same words again and again. " * 60)),
    Conversation("thoughts", user("Why?", "<think>\nHmm.\n</think>\n\nBecause.", "Sure?")),
)

WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a place: \"now\" or in 'n' days <= 7.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Such as Zürich or 東京"},
                "days": {"type": "integer", "minimum": 0, "default": 0},
                "units": {"type": "string", "enum": ["metric", "imperial"]},
            },
            "required": ["place"],
        },
    },
}
CLOCK: Tool = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A call of a function, as an assistant's message carries it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLED = (
    *user("How is the weather in Zürich?"),
    said("assistant", "", tool_calls=[call("weather", place="Zürich", days=2)]),
    said("tool", '{"celsius": 21.5, "sky": "clear"}', name="weather"),
)
WITH_TOOLS = (
    Conversation("a tool", user("How is the weather?"), (WEATHER,)),
    Conversation("two tools", user("How late is it?"), (WEATHER, CLOCK)),
    Conversation("a tool and a system", system("Use tools.", "How is the weather?"), (WEATHER,)),
    Conversation("a tool's result", CALLED, (WEATHER,)),
    Conversation(
        "an answer after a tool", (*CALLED, said("assistant", "Clear, 21.5 °C.")), (CLOCK,)
    ),
    Conversation(
        "two calls at once",
        (
            *user("Weather and time?"),
            said("assistant", "", tool_calls=[call("weather", place="Rom"), call("clock")]),
            said("tool", "rain", name="weather"),
            said("tool", "12:00", name="clock"),
        ),
        (WEATHER, CLOCK),
    ),
    Conversation(
        "nested arguments",
        (
            *user("Plan it."),
            said(
                "assistant",
                "On it.",
                tool_calls=[call("plan", steps=[{"n": 1, "ok": True}], note=None, x=1.5)],
            ),
            said("tool", "done\n", name="plan"),
        ),
        (CLOCK,),
    ),
    Conversation("a call without tools", CALLED),
)


def matrix_of(student: DirectoryText) -> tuple[Conversation, ...]:
    """All conversations that a student's template is held to.

    Those with tools only where its template knows tools; each hard string becomes a user's message,
    and each of its special tokens is written as plain text.
    """
    written = tuple(
        Conversation(
            f"{token!r} as plain text", system(f"Never say {token}.", f"{token} and x{token}y")
        )
        for token in student.special_strings
    )
    spelt = tuple(Conversation(f"the message {text!r}", user(text)) for text in HARD_STRINGS)
    return (*PLAIN, *(WITH_TOOLS if "tools" in student.template else ()), *written, *spelt)
