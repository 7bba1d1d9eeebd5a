"""What a fit is asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

from spqt_cli.errors import UsageError
from spqt_cli.measure import many_rows

METHODS = ("gptq", "full")
OWN = 40  # texts that the source writes for gptq


@dataclass(frozen=True)
class Training:
    """own: texts that the source writes. batch: of them in a step."""

    own: int
    steps: int
    batch: int


# SmolLM2-135M takes some 10 minutes of training in both (docs/fitting.md): two cores, and an H200.
TRAINING = {"cpu": Training(own=72, steps=90, batch=2), "gpu": Training(own=448, steps=400, batch=8)}
ROUNDED_ON = 64  # texts at most; more of them improve the training alone
MIN_WINDOW = 32


@dataclass(frozen=True)
class FitOptions:
    """method: gptq rounds for the inputs; full also trains scales, biases and norms. own: texts that the
    source writes itself. data: a file of text to add. window: tokens of a text. seed: of the model's own
    text. steps: of the training, of `batch` texts each. None: what suits method and device, see `settled`.
    """

    method: str = "gptq"
    own: int | None = None
    data: Path | None = None
    window: int = 512
    seed: int = 0
    steps: int | None = None
    batch: int | None = None

    def settled(self) -> "FitOptions":
        """These, with nothing left open."""
        default = TRAINING["cpu" if many_rows.on_cpu() else "gpu"]
        own = default.own if self.method == "full" else OWN
        return replace(
            self,
            own=own if self.own is None else self.own,
            steps=default.steps if self.steps is None else self.steps,
            batch=default.batch if self.batch is None else self.batch,
        )

    def check(self) -> None:
        """Raise UsageError (2) for values out of range."""
        if self.method not in METHODS:
            raise UsageError(f"there is no fit {self.method!r}", f"use one of: none, {', '.join(METHODS)}")
        if self.own is not None and (self.own < 0 or (self.own == 0 and self.data is None)):
            raise UsageError("there is no text to fit on", "give --own-text a number, or --data a file")
        if self.window < MIN_WINDOW or self.window % 2:
            raise UsageError(
                f"windows of {self.window} tokens", f"use an even number of at least {MIN_WINDOW}"
            )
        if self.steps is not None and self.method != "full":
            raise UsageError(f"--train-steps says nothing to --fit {self.method}", "--fit full trains")
        for number, unit in ((self.steps, "steps"), (self.batch, "texts a step")):
            if number is not None and number < 1:
                raise UsageError(f"{number} {unit}", "use at least 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative", "use 0 or more")
