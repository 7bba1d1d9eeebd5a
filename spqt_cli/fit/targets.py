"""The source's hidden states after its last block, window by window: what a model is trained towards."""

import numpy as np

from spqt_cli.fit.source_blocks import SourceBlocks
from spqt_cli.fit.store import Store
from spqt_cli.measure import many_rows

TOGETHER = 4  # windows that pass a block together


def name(window: int) -> str:
    """Of a window's states (1, window, width) in the store."""
    return f"target-{window}"


def missing(store: Store, windows: np.ndarray) -> list[int]:
    """The windows whose states are not there."""
    return [w for w in range(len(windows)) if not store.has(name(w))]


def take_over(store: Store, blocks: int) -> None:
    """Keep by window the states that rounding left by chunks, of the first windows, in their order."""
    chunk, w = 0, 0
    while store.has(last := f"source-{blocks}-{chunk}"):
        for states in store.load(last):
            store.save(name(w), states[None])
            w += 1
        chunk += 1


def make(source: SourceBlocks, windows: np.ndarray, which: list[int], store: Store) -> None:
    """Pass windows (texts, window) of some numbers through the source, whose blocks nobody read before."""
    chunks = [which[i : i + TOGETHER] for i in range(0, len(which), TOGETHER)]
    with many_rows.many_rows(heads=False, gradients=False):
        for c, chunk in enumerate(chunks):
            store.save(f"passing-0-{c}", source.entering(windows[chunk]))
        for number, block in enumerate(source.blocks):
            source.fill(block)
            for c in range(len(chunks)):
                out = block.run(store.load(f"passing-{number}-{c}"))
                store.save(f"passing-{number + 1}-{c}", out)
            source.drop(block)
            store.drop(f"passing-{number}-*")
    for c, chunk in enumerate(chunks):
        for w, states in zip(chunk, store.load(f"passing-{len(source.blocks)}-{c}"), strict=True):
            store.save(name(w), states[None])
    store.drop("passing-*")
