"""What a tokenizer does at the borders of a text: one BOS before it, and where an answer's text begins.

It knows tokenizers as mlx-lm wraps them, and neither models nor chat templates.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what decoding writes for the first bytes of a character


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as a prompt begins with it; a text that spells its BOS gets no second one."""
    framed = list(tokenizer.encode(text))
    bos = tokenizer.bos_token_id
    if bos is None or framed[:2] != [bos, bos]:
        return framed
    spelled = tokenizer.encode(text, add_special_tokens=False)
    return framed[1:] if framed[1 : len(spelled) + 1] == spelled else framed


class Answer:
    """The text of an answer, token by token: prompt and answer decoded together, less the prompt.

    mlx-lm's own streaming takes the answer for the beginning of a text, and so drops its first space.
    prompt: the token ids before the answer.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        self._settle(list(prompt))

    def push(self, token: int) -> str:
        """The text that is certain once this token has come; empty amid a character."""
        self._held.append(token)
        text = self._decode(self._before + self._held)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is still held when the answer ends."""
        return self._take(self._decode(self._before + self._held)) if self._held else ""

    def _take(self, text: str) -> str:
        """What `text`, decoded from all that is at hand, has more than was shown."""
        extends = text.startswith(self._shown)
        piece = text[len(self._shown) :] if extends else self._decode(self._held)
        self._settle(self._held)
        return piece

    def _settle(self, tokens: list[int]) -> None:
        """Go on from tokens whose text is out: the last ones are enough to decode what follows."""
        self._before, self._held = tokens, []
        self._shown = self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
