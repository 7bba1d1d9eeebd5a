"""Whether a loaded tokenizer gives what tokenizer.json says, on lines that are hard to cut.

transformers 5 rebuilds some tokenizers from their class and takes only vocabulary and merges from
tokenizer.json. It knows tokenizers, and no folders.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_SAMPLED = 2048  # tokens of a vocabulary that become text
IN_A_LINE = 16
# Where pre-tokenizers, normalizers and decoders of published models part.
LINES = (
    # digits: one by one, in threes, in runs, of other scripts
    "0 12 345 6789 10203 1234567890 3.14159 1,234,567.89 2024-02-29T23:59:59Z v1.2.3 0xDEADBEEF 1e-10",
    "abc123def 123abc 4K 100% $5.00 №7 ½ ¾ x² H₂O ٣٤٥ १२३ １２３ Ⅷ ⑫ 𝟘𝟙",
    # contractions, apostrophes, case
    "I'm you're he'll she'd we've it's don't CAN'T I'LL WE'VE O'Neill rock'n'roll 'tis l'été d’accord",
    "it’s 'Twas O'Malley D'Souza L'Tour O'Dea o'reilly Q'Veren x'LLama 'real' 'LLM'",
    "HTTPServer camelCase snake_case kebab-case SHOUTING iPhone ﬁne ǅ ß ẞ İstanbul ıI ΑΣΣΟΣ",
    # white space: leading, trailing, runs, tabs, newlines of all kinds
    " a",
    "  a",
    "   a  ",
    "a ",
    "a  ",
    "a   b    c     d",
    "\ta\t\tb\t",
    " \t \t a",
    " ",
    "  ",
    "\n",
    "\n\n",
    "",
    "a\nb\n\nc\n\n\nd",
    "a \n b  \n\n  c",
    "\n a",
    "\r\na\r\n\r\nb\rc",
    "a\n\t\tb",
    "end.\n",
    "end. \n\n",
    "\n\n\n",
    "no\u00a0break thin\u2009space wide\u3000space zero\u200bwidth line\u2028sep next\u0085line vt\x0bff\x0c",
    # punctuation
    "Hello, world! (yes) [no] {maybe} <tag/> \"quoted\" 'single' `code` «guillemets» „low“ — – … · • ¿? ¡!",
    "...!!!???,,,;;;:::---___***###@@@&&&%%%$$$^^^~~~+++===///\\\\\\|||",
    "a.b,c;d:e!f?g",
    "?!\n",
    "-- \n--\n",
    # combining marks and normal forms
    "e\u0301 é a\u0308\u0323 n\u0303o\u0308 Å Å ậ ｶﾞ ガ \u0301leading",
    "ﬀ ﬃ Ⅳ ℃ ™ ① ㎏ ｆｕｌｌ ㍿ ² ª",
    "हिन्दी में लिखा क्षत्रिय বাংলা தமிழ் ไทยไม่มีเว้นวรรค ကမ္ဘာ བོད་",
    "שָׁלוֹם עולם مُحَمَّد العَرَبِيَّة ـــ ١٢",
    # other scripts and their mixtures
    "今天天气很好，我们去公园。日本語のテキスト、カタカナ。한국어 문장입니다! 𠮷野家 繁體",
    "ру́сский текст ΕΛΛΗΝΙΚΆ ελληνικά Հայերեն ქართული",
    "中文English混合123テスト한글αβγ",
    "naïve café Zürich Łódź São Tomé Đà Nẵng fjørd",
    # emoji, joined and flagged; signs beyond the basic plane
    "😀😀 👩\u200d👩\u200d👧 👍🏽 🇩🇪🇫🇷 ❤️ ✌🏿 #️⃣ 🏴\U000e0067\U000e0062\U000e007f a😀b",
    "𝕳𝖊𝖑𝖑𝖔 𐍈 𓀀 \U000f0000 \ue000 \ufeffbom",
    "∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ⇒ √2 ≠ π ± ∞ → ← ↔ ░▒▓ ─│┌",
    # code, markup, addresses
    "def f(x, *, y=None):\n    if x != y:\n\t    return [i ** 2 for i in range(10)]  # note\n\n\n",
    "for(int i=0;i<n;++i){a[i]+=b->c;}//x\n/* y */\n#include <stdio.h>\n",
    "SELECT * FROM t WHERE a='b' AND c>=1;--",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "$$\\frac{a}{b}$$",
    "https://example.org/a/b?c=d&e=%20f#g user.name+tag@example.co.uk C:\\dir\\file.txt ../x/y.tar.gz ~/z",
    "<div class='a'>text</div>\r\n  <br/>",
    "# Title\n\n- item\n  - nested\n1. one\n2. two\n\n> quote **bold** _it_",
    # long and odd
    "a" * 300,
    "ab" * 150,
    "1" * 40,
    "=" * 80,
    " " * 40 + "x",
    "\n" * 12,
    "\t" * 9 + "x",
    "Donaudampfschifffahrt" * 12,
    "\x00\x01\x1b[0m\x7f",
    "▁a ▁▁b Ġc Ċ",
    "##a @@b a@@ ##",
    "[INST] a [/INST] << >> <0x0A> <0xE2>",
    "<n> <|x|> </x>",
)


def lines(truth: "Tokenizer") -> list[str]:
    """The hard lines, and more from the added tokens and the vocabulary of a tokenizer."""
    added = [token.content for token in truth.get_added_tokens_decoder().values()]
    ids = sorted(truth.get_vocab(with_added_tokens=False).values())
    sampled = [truth.decode([i]) for i in ids[:: len(ids) // MOST_SAMPLED + 1]]
    return [
        *LINES,
        *_joined(added, "a{0}b {0} \n{0}\t"),
        *_joined(sampled, "{0}"),
        *_joined(sampled, " {0}{0}"),
    ]


def _joined(texts: list[str], form: str) -> Iterator[str]:
    for at in range(0, len(texts), IN_A_LINE):
        yield "".join(form.format(text) for text in texts[at : at + IN_A_LINE])


def difference(tokenizer: Any, truth: "Tokenizer") -> str | None:
    """The first line that a tokenizer encodes or decodes otherwise than `truth`; None if there is none.

    tokenizer: as mlx-lm or transformers load it. truth: the one in tokenizer.json. Both with and without
    the special tokens around a text.
    """
    truth.no_truncation()  # a limit in tokenizer.json binds who asks for it
    truth.no_padding()
    for line in lines(truth):
        for framed in (False, True):
            try:
                wanted = truth.encode(line, add_special_tokens=framed).ids
            except Exception:  # the library raises it bare, for a text that tokenizer.json can't take
                continue
            if _encoded(tokenizer, line, framed) != wanted:
                return line
            if _decoded(tokenizer, wanted) != truth.decode(wanted, skip_special_tokens=False):
                return line
    return None


def _encoded(tokenizer: Any, line: str, framed: bool) -> list[int] | None:
    """Token ids, or None where the tokenizer fails."""
    try:
        return list(tokenizer.encode(line, add_special_tokens=framed))
    except Exception:  # whatever it is, it is no token ids
        return None


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
