"""How fast this machine decodes with given thresholds: a short run of the model itself.

The device's profile, if there is one, chooses how each layer runs, as `spqt generate` lets it. Nothing
that is measured here stays in the model.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from spqt_cli.backends import select
from spqt_cli.decode import active_counts, relayout, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.measure import probes

PROMPT_TOKENS = 64
TOKENS = 32
WARM_TOKENS = 4  # not timed: kernels are compiled, buffers are made


class Pace:
    """Measures a probed model; the probes step aside meanwhile. tokens: (length,), the prompt's text."""

    def __init__(self, loaded: session.Loaded, harness: probes.Harness, tokens: np.ndarray) -> None:
        self.loaded, self.harness = loaded, harness
        self._prompt = mx.array(tokens[:PROMPT_TOKENS])
        self._cache: list[Any] | None = None

    def tokens_per_second(self, thresholds: Mapping[str, float], sparsity: float) -> float:
        """The rate of decoding with these thresholds, by the median time of a token.

        thresholds: path -> threshold; layers left out, or at 0, run dense. sparsity: of all weights.
        """
        with self._ready(thresholds, sparsity), active_counts.counting(select.backend().count_every):
            cache = self._filled()
            times = [time.perf_counter() for _ in _steps(self.loaded.model, self._prompt[-1:], cache)]
        spent = np.diff(times)[WARM_TOKENS:]
        return 1 / statistics.median(spent.tolist())

    def _filled(self) -> list[Any]:
        if self._cache is None:
            self._cache = probes.prompt_cache(self.loaded.model, self._prompt[None, :-1])
        return copy.deepcopy(self._cache)

    @contextmanager
    def _ready(self, thresholds: Mapping[str, float], sparsity: float) -> Iterator[None]:
        """The model as generate would run it with these thresholds; afterwards as it was."""
        loaded, head = self.loaded, relayout.find_head(self.loaded.model)
        with probes.unprobed(loaded.model, self.harness):
            layers = zigzag_layers(loaded.model)
            for path, layer in layers.items():
                layer.set_threshold(thresholds.get(path) or None)
            loaded.sparsity = sparsity or None
            try:
                if sparsity:
                    session.apply_profile(loaded)
                yield
            finally:
                loaded.sparsity = None
                for layer in layers.values():
                    layer.set_threshold(None)
                if head is not None:
                    loaded.model.update_modules(tree_unflatten([(head.path, head.module)]))


def _steps(language_model: Any, prompt: mx.array, cache: list[Any]) -> Iterator[Any]:
    from mlx_lm.generate import generate_step

    return generate_step(prompt, language_model, max_tokens=TOKENS, prompt_cache=cache)
