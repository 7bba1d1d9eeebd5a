"""What a fit is asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

from spqt_cli.errors import UsageError
from spqt_cli.fit.starts import OPENINGS_EACH
from spqt_cli.measure import many_rows

METHODS = ("gptq", "full")
OWN = 40  # texts that the source writes for gptq


@dataclass(frozen=True)
class Training:
    """own: texts that the source writes. rounded_on: of these, at most; the rest improves the training alone.
    batch: texts in a step. sparsities: of the masks, one is drawn for each step. scored: the part of a text's
    positions whose predictions a step compares. openings_each: see `starts.starts`.
    """

    own: int
    rounded_on: int
    steps: int
    batch: int
    sparsities: tuple[float, ...]
    scored: float
    openings_each: int


# SmolLM2-135M takes some 10 minutes of training on two cores, 5 on an H200 (docs/fitting.md).
TRAINING = {
    "cpu": Training(
        own=72, rounded_on=64, steps=90, batch=2, sparsities=(0.5, 0.6), scored=0.5, openings_each=6
    ),
    "gpu": Training(
        own=448, rounded_on=240, steps=400, batch=8, sparsities=(0.4, 0.5), scored=1, openings_each=2
    ),
}
MIN_WINDOW = 32


@dataclass(frozen=True)
class FitOptions:
    """method: gptq rounds for the inputs; full also trains scales, biases and norms. own: texts that the
    source writes itself. data: a file of text to add. window: tokens of a text. seed: of the model's own
    text. steps: of the training, of `batch` texts each; rounded_on, sparsities, scored, openings_each: as in
    `Training`.
    None: what suits method and device, see `settled`.
    """

    method: str = "gptq"
    own: int | None = None
    data: Path | None = None
    window: int = 512
    seed: int = 0
    steps: int | None = None
    batch: int | None = None
    rounded_on: int | None = None
    sparsities: tuple[float, ...] | None = None
    scored: float | None = None
    openings_each: int | None = None

    def settled(self) -> "FitOptions":
        """These, with nothing left open."""
        default = TRAINING["cpu" if many_rows.on_cpu() else "gpu"]
        full = self.method == "full"
        own, openings_each = (default.own, default.openings_each) if full else (OWN, OPENINGS_EACH)
        return replace(
            self,
            own=own if self.own is None else self.own,
            steps=default.steps if self.steps is None else self.steps,
            batch=default.batch if self.batch is None else self.batch,
            rounded_on=default.rounded_on if self.rounded_on is None else self.rounded_on,
            sparsities=default.sparsities if self.sparsities is None else self.sparsities,
            scored=default.scored if self.scored is None else self.scored,
            openings_each=openings_each if self.openings_each is None else self.openings_each,
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
