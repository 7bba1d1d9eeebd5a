"""What an estimate of how long work takes is made of: a product that is timed now, and words for people."""

import time

import mlx.core as mx
import numpy as np

from spqt_cli.measure import many_rows

TIMED = 0.2  # seconds


def speed() -> float:
    """Float32 operations per second in a product of many rows."""
    x, w = np.ones((2048, 1024), np.float32), np.ones((1024, 1024), np.float32)
    on_device = (mx.array(x), mx.array(w))

    def product() -> None:
        if many_rows.on_cpu():
            x @ w
        else:
            mx.eval(on_device[0] @ on_device[1])

    product()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < TIMED:
        product()
        count += 1
    return 2 * x.size * w.shape[1] * count / (time.perf_counter() - started)


def words(expected: float) -> str:
    """ "about 4 minutes", "about 3 hours"."""
    if expected < 90:
        return f"about {max(1, round(expected / 10)) * 10} seconds"
    if expected < 5400:
        return f"about {round(expected / 60)} minutes"
    return f"about {round(expected / 3600)} hours"
