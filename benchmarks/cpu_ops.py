"""The CPU's operations other than the Zigzag product, ours and MLX's own: `python -m benchmarks.cpu ops`."""

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from benchmarks.cpu import random_layer, stock_matrix, stock_product
from benchmarks.machine import facts
from spqt_cli.backends import cpu, interface
from spqt_cli.decode import hooks_cpu
from spqt_cli.decode.hooks_cpu import STOCK

WIDTH, MIDDLE, HEADS, KEY_HEADS, HEAD_WIDTH, WORDS = 576, 1536, 9, 3, 64, 49152  # of SmolLM2-135M
OP_REPETITIONS, OPS = 21, 30  # an evaluation holds as many ops as the model has layers

Op = Callable[[], mx.array]


def pairs() -> dict[str, tuple[Op, Op]]:
    """Name of an op: ours and MLX's own."""
    x, w = mx.random.normal((1, 1, WIDTH)), mx.ones((WIDTH,))
    q = mx.random.normal((1, HEADS, 1, HEAD_WIDTH))
    head = mx.quantize(mx.random.normal((WORDS, WIDTH)), group_size=64, bits=4)
    mx.eval(x, w, q, head)
    turn = {"traditional": False, "base": 1e5, "scale": 1.0, "offset": 100}
    found: dict[str, tuple[Op, Op]] = {
        "rms_norm": (lambda: cpu.rms_norm(x, w, 1e-5), lambda: STOCK["rms_norm"](x, w, 1e-5)),
        "rope": (lambda: cpu.rope(q, HEAD_WIDTH, **turn), lambda: STOCK["rope"](q, HEAD_WIDTH, **turn)),
    }
    for keys in (128, 1024):
        k = mx.random.normal((1, KEY_HEADS, keys, HEAD_WIDTH))
        mx.eval(k)
        found[f"attention, {keys} keys"] = (
            lambda k=k: cpu.attention(q, k, k, scale=0.125, causal=False),
            lambda k=k: STOCK["scaled_dot_product_attention"](q, k, k, scale=0.125),
        )
    found[f"head, {WORDS} x {WIDTH}"] = (
        lambda: cpu.head_matmul(x, *head, 4, 64),
        lambda: mx.quantized_matmul(x, *head, group_size=64, bits=4),
    )
    logits = mx.random.normal((1, WORDS))
    mx.eval(logits)
    found[f"log_sum_exp of {WORDS}"] = (
        lambda: cpu.log_sum_exp(logits, last=False, keepdims=False),
        lambda: hooks_cpu._logsumexp(logits),
    )
    return found | of_a_block(x, w)


def of_a_block(x: mx.array, w: mx.array) -> dict[str, tuple[Op, Op]]:
    """The gated module, and all that follows attention; all channels active."""
    forms = ((WIDTH, WIDTH), (MIDDLE, WIDTH), (MIDDLE, WIDTH), (WIDTH, MIDDLE))
    out, gate, up, down = (random_layer(*form) for form in forms)
    stock_out, *stock = (stock_matrix(*form) for form in forms)
    gated = cpu.prepare_gated(x, [gate, up], down)
    tail = cpu.prepare_tail(x, interface.Tail(out, interface.Norm(w, 1e-5), [gate, up], down))
    assert gated is not None
    assert tail is not None

    def stock_gated(x: mx.array) -> mx.array:
        return stock_product(swiglu(stock_product(x, stock[0]), stock_product(x, stock[1])), stock[2])

    def stock_tail() -> mx.array:
        h = x + stock_product(x, stock_out)
        return h + stock_gated(STOCK["rms_norm"](h, w, 1e-5))

    return {
        "gated module": (lambda: gated(x, None, None)[0], lambda: stock_gated(x)),
        "all after attention": (lambda: tail(x, x, [None] * 3)[0], stock_tail),
    }


def microseconds(op: Op, count: int) -> float:
    """Of one op, when `count` of them are evaluated together."""
    start = time.perf_counter()
    mx.eval([op() for _ in range(count)])
    return (time.perf_counter() - start) / count * 1e6


def table(threads: int) -> None:
    """Ours and stock in turns, float32, one token of SmolLM2-135M; both build their graph inside the time."""
    cpu.set_threads(threads)
    print(f"{facts()}; {threads} threads\n\n| op | stock us | ours us | gain |\n|---|---|---|---|")
    for name, both in pairs().items():
        count = 1 if name.startswith(("head", "log")) else OPS
        rounds = [[microseconds(op, count) for op in both] for _ in range(OP_REPETITIONS + 1)][1:]
        ours, stock = (statistics.median(one[i] for one in rounds) for i in range(2))
        print(f"| {name} | {stock:.1f} | {ours:.1f} | {stock / ours:.1f}x |")
