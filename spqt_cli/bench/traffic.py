"""What skipping leaves to read: bytes of the active channels, and whole memory lines.

A line is what memory hands over at once: 64 bytes on most CPUs, 128 on NVIDIA's GPUs (in sectors of
32). A chunk smaller than a line is not skipped unless its neighbours are too.
"""

from collections.abc import Sequence

import numpy as np

LINE_BYTES = 128


def chunk_bytes(bits: int, group_size: int, band: int, scale_bytes: int) -> tuple[int, int, int]:
    """Bytes that one input channel of one band takes in codes, scales and biases."""
    scales = band // group_size * scale_bytes
    return band * bits // 8, scales, scales


def line_bytes(active: np.ndarray, bands: int, chunks: Sequence[int], line: int = LINE_BYTES) -> int:
    """Bytes of all lines that hold a chunk of an active channel.

    active: (inputs,), bool. chunks: from `chunk_bytes`; each array is taken to begin at a line.
    """
    return sum(_lines(active, chunk, bands, line) * line for chunk in chunks)


def _lines(active: np.ndarray, chunk: int, bands: int, line: int) -> int:
    """Lines of an array of (bands, inputs) chunks that an active channel's chunk lies in."""
    channels = np.flatnonzero(active)
    starts = (np.arange(bands)[:, None] * active.size + channels[None]).reshape(-1) * chunk
    total = -(-bands * active.size * chunk // line)
    edges = np.zeros(total + 1, np.int64)  # +1 where a chunk's lines begin, -1 after they end
    np.add.at(edges, starts // line, 1)
    np.add.at(edges, (starts + chunk - 1) // line + 1, -1)
    return int(np.count_nonzero(np.cumsum(edges)[:total] > 0))
