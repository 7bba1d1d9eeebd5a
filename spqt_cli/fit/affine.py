"""What is trained of a block: a factor and an offset for each group of its layers, and its norms' weights.

A group's values become values * (1 + factor) + offset * spread, spread being their standard deviation: with
fixed codes that is another scale and another bias. Adam moves all of it. It knows no model.
"""

from dataclasses import dataclass

import mlx.core as mx

BETAS, TINY = (0.9, 0.95), 1e-8  # Adam's
LEAST_SPREAD = 1e-6
NORM_RATE = 0.5  # the learning rate of norms, as a part of the factors'


@dataclass
class Groups:
    """A layer's groups as they were rounded, and their spread: (bands, inputs, groups) float32 each."""

    scales: mx.array
    biases: mx.array
    spread: mx.array

    def moved(self, factor: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        """The scales and biases that a factor and an offset make."""
        return self.scales * (1 + factor), self.biases * (1 + factor) + offset * self.spread


class Trained:
    """Values by name, with Adam's moments: float32 all."""

    def __init__(self, values: dict[str, mx.array]) -> None:
        self.values = values
        self.first = {name: mx.zeros_like(value) for name, value in values.items()}
        self.second = {name: mx.zeros_like(value) for name, value in values.items()}

    def step(self, slopes: dict[str, mx.array], rates: dict[str, float], number: int) -> None:
        """Adam's step of a number, from 1 on. slopes: of some values; rates: the learning rate of each."""
        one, two = BETAS
        for name, slope in slopes.items():
            first = self.first[name] = one * self.first[name] + (1 - one) * slope
            second = self.second[name] = two * self.second[name] + (1 - two) * slope * slope
            size = mx.sqrt(second / (1 - two**number)) + TINY
            self.values[name] = self.values[name] - rates[name] / (1 - one**number) * first / size
        mx.eval(self.values, self.first, self.second)

    def flat(self) -> mx.array:
        """Everything one after another, for saving."""
        return mx.concatenate([a.reshape(-1) for part in self._parts() for a in part.values()])

    def take(self, flat: mx.array) -> None:
        """Take what `flat` gave."""
        at = 0
        for part in self._parts():
            for name, old in part.items():
                part[name] = flat[at : at + old.size].reshape(old.shape)
                at += old.size
        mx.eval(*self._parts())

    def _parts(self) -> tuple[dict[str, mx.array], ...]:
        return self.values, self.first, self.second
