"""Who decodes: what is said holds for a block and for the thread that said it."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import mlx.core as mx
import pytest

import spqt_cli
from spqt_cli.decode import phase
from spqt_cli.format import layout
from tests.decode.test_layers import close, expected, make_layer


def test_nobody_says_anything_so_all_channels_are_used():
    assert phase.decodes() is False
    layer = make_layer()
    x = mx.random.normal((1, 1, 64))
    assert close(layer(x), expected(layer, x, masked=False))


def test_blocks_nest_and_end_with_an_error_too():
    with spqt_cli.decoding():
        with phase.prompting():
            assert not phase.decodes()
        assert phase.decodes()
        with pytest.raises(RuntimeError), phase.prompting():
            raise RuntimeError
        assert phase.decodes()
    assert not phase.decodes()


def test_threads_are_told_apart():
    """As in a server that decodes for some while another thread reads a prompt, through the same layer."""
    layer, meet = make_layer(), Barrier(2, timeout=10)
    x = mx.random.normal((1, 1, 64))
    mx.eval(x, layer.parameters())  # MLX's streams belong to one thread

    def ask(block):
        with block():
            meet.wait()  # both are within their blocks
            found = [layer(x + 0) for _ in range(20)]
            mx.eval(found)
            return found

    with spqt_cli.decoding(), ThreadPoolExecutor(2) as pool:
        sparse, dense = pool.map(ask, (phase.decoding, phase.prompting))
        assert pool.submit(phase.decodes).result() is False  # nor does a thread inherit it
    masked = layout.mask(x, layer.threshold)
    assert all(close(y, expected(layer, masked, masked=False)) for y in sparse)
    assert all(close(y, expected(layer, x, masked=False)) for y in dense)
