"""What a model or its files say is untrusted: control characters must not reach a terminal."""

import re

# C0 and C1 controls other than tab and newline: escape sequences begin with one of them. And surrogates:
# they stand for bytes of file names that are not UTF-8, and can't be printed.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def harmless(text: str) -> str:
    """`text` with control characters shown as symbols (ESC as the picture of ESC), so none acts."""
    return _CONTROLS.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # the block "Control Pictures"
    return "\u2421" if code == 0x7F else "\ufffd"
