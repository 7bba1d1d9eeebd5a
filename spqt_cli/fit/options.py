"""What a fit is asked for."""

from dataclasses import dataclass
from pathlib import Path

from spqt_cli.errors import UsageError

METHODS = ("gptq", "full")
OWN = {"gptq": 40, "full": 72}  # texts that the source writes, where none are asked for
ROUNDED_ON = 64  # texts at most; more of them improve the training alone
MIN_WINDOW = 32


@dataclass(frozen=True)
class FitOptions:
    """method: gptq rounds for the inputs; full also trains scales, biases and norms. own: texts that the
    source writes itself, None for OWN. data: a file of text to add. window: tokens of a text, the first
    half a prompt. seed: of the model's own text. steps: of the training, of two texts each.
    """

    method: str = "gptq"
    own: int | None = None
    data: Path | None = None
    window: int = 512
    seed: int = 0
    steps: int = 90

    @property
    def own_texts(self) -> int:
        return OWN[self.method] if self.own is None else self.own

    def check(self) -> None:
        """Raise UsageError (2) for values out of range."""
        if self.method not in METHODS:
            raise UsageError(f"there is no fit {self.method!r}", f"use one of: none, {', '.join(METHODS)}")
        if self.own_texts < 0 or (self.own_texts == 0 and self.data is None):
            raise UsageError("there is no text to fit on", "give --own-text a number, or --data a file")
        if self.window < MIN_WINDOW or self.window % 2:
            raise UsageError(
                f"windows of {self.window} tokens", f"use an even number of at least {MIN_WINDOW}"
            )
        if self.method == "full" and self.steps < 1:
            raise UsageError(f"{self.steps} steps", "use at least 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative", "use 0 or more")
