"""What a fit is asked for."""

from dataclasses import dataclass
from pathlib import Path

from spqt_cli.errors import UsageError

METHODS = ("gptq",)
MIN_WINDOW = 32


@dataclass(frozen=True)
class FitOptions:
    """method: a key of METHODS. own: texts that the source writes itself. data: a file of text to add.
    window: tokens of a text, the first half a prompt. seed: of the model's own text.
    """

    method: str = "gptq"
    own: int = 24
    data: Path | None = None
    window: int = 512
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError (2) for values out of range."""
        if self.method not in METHODS:
            raise UsageError(f"there is no fit {self.method!r}", f"use one of: none, {', '.join(METHODS)}")
        if self.own < 0 or (self.own == 0 and self.data is None):
            raise UsageError("there is no text to fit on", "give --own-text a number, or --data a file")
        if self.window < MIN_WINDOW or self.window % 2:
            raise UsageError(
                f"windows of {self.window} tokens", f"use an even number of at least {MIN_WINDOW}"
            )
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative", "use 0 or more")
