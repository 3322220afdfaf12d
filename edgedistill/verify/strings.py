"""Strings that tokenizers cut differently: numbers, white space, marks, scripts, emoji, code."""

from __future__ import annotations

from collections.abc import Sequence

HARD_STRINGS = (
    "Hello, world!",
    "1234567890 12,345.67 3.14159 2024-02-29T23:59:60Z",
    "7750-A x86_64 IPv6 ::1 0xDEADBEEF 1e-10 50% $1,249.99",
    "   leading and trailing   ",
    "tabs\tand\n\nnewlines\r\nand  double   triple    quadruple     spaces",
    "I'm you're he'll WE'VE they'd o'clock rock'n'roll 'quoted'",
    "def f(x):\n    return {k: v for k, v in x.items() if v != None}\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; } // comment",
    "Größe naïve café Ångström ﬁnancial ½ ² ™",
    "你好，世界！ こんにちは 안녕하세요 สวัสดี",
    "Здравствуйте Γειά σου مرحبا שלום नमस्ते",
    "🙂🎉👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 :-) ;( <3 ¯\\_(ツ)_/¯",
    "zero\u200bwidth \u00a0nbsp \u2028line \ufeffbom e\u0301 combining",
    "https://example.org/a?b=c&d=%20e#f user@example.org @handle #tag",
    "ALLCAPS camelCase snake_case kebab-case SCREAMING_SNAKE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....,,,,;;;;!!!!????----====____####****",
    "x" + " " * 40 + "y" + "\n" * 12 + "z",
    "",
    " ",
    "\n",
    "\t\t\n \n",
    "a",
    "0",
    " 7 77 777 7777 77777",
    "1st 2nd 3rd 4x4 mp3 H2O CO2 v1.2.3-rc4+build.5",
    '{"key": [1, 2.5, null, true], "nested": {"a b": "\\n\\u00e9\\\\"}}',
    "<html><body class='x'>&nbsp;&lt;p&gt;</body></html>",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x_%' -- end",
    "C:\\Users\\me\\file (1).txt /usr/lib/../bin ~/.config",
    "E = mc², ∑ᵢ xᵢ ≤ ∞, α→β, 3 × 4 ≠ 13, √2 ≈ 1.414, ∂f/∂x",
    "“curly” ‘single’ „low“ «angle» – en — em … ellipsis",
    "don’t it’s ’tis L’été d'accord",
    "Straße STRASSE ǅ ŉ ﬀ Ⅷ ① ٣ ५",
    "ไม่มีช่องว่างระหว่างคำ 日本語テキストカタカナ",
    "🇫🇷🇩🇪 1️⃣ #️⃣ ✂︎ ✂️ 😀😃😄",
    "word\u3000ideographic\u2009thin\u202fnarrow",
    "The quick brown fox jumps over the lazy dog. " * 8,
)


def special_strings(special: Sequence[str]) -> list[str]:
    """Special tokens written as plain text."""
    return [f"before{token}after {token} end" for token in special]
