"""Arrays that do not lie in order: the extension puts them in order itself."""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])

LAYOUTS = {
    "part of each row": lambda a: a[..., 8:24],
    "every other row": lambda a: a[:, ::2],
    "every other number": lambda a: a[..., ::2],
    "axes turned": lambda a: a.transpose(2, 0, 1),
    "outer axes turned": lambda a: a.transpose(1, 0, 2),
    "backwards": lambda a: a[::-1, :, ::-1],
    "one row for all": lambda a: mx.broadcast_to(a[:1, :1], a.shape),
    "one number for all": lambda a: mx.broadcast_to(a[:1, :1, :1], a.shape),
    "an axis of one": lambda a: a[:, 1:2, 4:20],
    "a column": lambda a: a[..., 3:4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_in_memory_changes_nothing(layout):
    both = [mx.array(np.random.default_rng(i).normal(size=(3, 5, 32)).astype(np.float32)) for i in range(2)]
    parts = [LAYOUTS[layout](a) for a in both]
    gate, up = (mx.array(np.ascontiguousarray(np.array(part))) for part in parts)
    assert mx.array_equal(cpu.swiglu(*parts), cpu.swiglu(gate, up))
    found, expected = (cpu.log_sum_exp(a, last=True, keepdims=False) for a in (parts[0], gate))
    assert mx.array_equal(found, expected)
