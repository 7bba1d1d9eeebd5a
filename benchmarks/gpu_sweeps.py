"""Launch geometries tried beside the rule's, and what a launch costs by itself; see bench_gpu.py."""

import itertools

import mlx.core as mx
from gpu_common import layers_of, set_density, sparse, stock, timed

from spqt_cli.backends.gpu import first_use, geometry, weights
from spqt_cli.format import layout


def use(cut: geometry.Geometry) -> None:
    """Launches with this geometry instead of the rule's."""
    geometry.choose = lambda *_: cut
    first_use.verdict = lambda *_, **__: ""  # a sweep meets many variants; `check` covers what is shipped


def candidates(outputs: int, inputs: int) -> list[geometry.Geometry]:
    """Cuts around the rule's: rows, channels in flight, threadgroups, wider lanes, decoders."""
    units = -(-layout.band_of(outputs, 64) // 32)
    lanes = -(-units // -(-units // 32))
    cuts = []
    for rows, unroll, groups in itertools.product((8, 16), (2, 4, 6), (128, 264)):
        if rows * unroll <= 64:
            cuts.append(cut_of(lanes, rows, unroll, (outputs, inputs), groups))
    cuts += [cut_of(lanes, 8, 4, (outputs, inputs), 128, decode=decode) for decode in (0, 1)]
    cuts += [cut_of(-(-lanes // 2), 16, unroll, (outputs, inputs), 128, outputs=64) for unroll in (1, 2)]
    return list(dict.fromkeys(cuts))


def cut_of(
    lanes: int, rows: int, unroll: int, shape: tuple[int, int], groups: int, **more: int
) -> geometry.Geometry:
    outputs, inputs = shape
    settings = {"outputs": 32, "slice": 8, "decode": 2, **more}
    band = layout.band_of(outputs, 64)
    tiles = -(-band // (lanes * settings["outputs"])) * -(-outputs // band)
    stripe = -(-inputs // max(1, groups // tiles))
    threads = -(-lanes * rows // 32) * 32
    collected = threads * max(1, min(8192 // threads, 32, -(-stripe // threads)))
    return geometry.Geometry(lanes=lanes, rows=rows, unroll=unroll, list=collected, stripe=stripe, **settings)


DENSITIES = (0.5, 1.0)


def sweep(outputs: int, inputs: int) -> list[dict]:
    """Microseconds at half and all active for each candidate; prints the best."""
    base = stock(outputs, inputs)
    print(f"\n{outputs}x{inputs}: stock {base['us']} us")
    layers = layers_of(outputs, inputs, 0.5)
    rows = [{"shape": [outputs, inputs], "stock": base}]
    for cut in candidates(outputs, inputs):
        use(cut)
        row = {"shape": [outputs, inputs], "cut": cut._asdict()}
        for d in DENSITIES:
            set_density(layers, d)
            for one in layers:
                weights.kept(one).forget()
            try:
                row[str(d)] = sparse(layers, inputs)["us"]
            except RuntimeError as error:
                row["error"] = str(error)[:2000]
                print(row["error"])
                break
        rows.append(row)
    done = [row for row in rows[1:] if "error" not in row]
    for row in sorted(done, key=lambda r: r[str(DENSITIES[0])])[:14]:
        cut = geometry.Geometry(**row["cut"])
        times = "  ".join(f"{d}: {row[str(d)]:7.2f} ({base['us'] / row[str(d)]:.2f}x)" for d in DENSITIES)
        form = f"{cut.outputs} x {cut.lanes:2} x {cut.rows:3} unroll {cut.unroll} decode {cut.decode}"
        print(f"  {form} list {cut.list:4} stripe {cut.stripe:5}  {times}")
    return rows


def overhead() -> list[dict]:
    """What a launch costs by itself: kernels that do nothing, with short and long texts."""
    rows = []
    make = mx.fast.metal_kernel if mx.metal.is_available() else mx.fast.cuda_kernel
    x = mx.zeros((64,))
    mx.eval(x)
    index = "thread_position_in_grid.x" if mx.metal.is_available() else "threadIdx.x"
    for inputs, outputs, padding in ((1, 1, 0), (5, 1, 0), (1, 2, 0), (5, 2, 0), (5, 2, 8000)):
        kernel = make(
            name=f"nothing_{inputs}_{outputs}_{padding}",
            input_names=[f"x{i}" for i in range(inputs)],
            output_names=[f"y{i}" for i in range(outputs)],
            source="/*" + "." * padding + "*/" + "".join(f"y{i}[{index}] = 0;" for i in range(outputs)),
        )
        call = {
            "inputs": [x] * inputs, "grid": (32, 1, 1), "threadgroup": (32, 1, 1),
            "output_shapes": [(32,)] * outputs, "output_dtypes": [mx.float32] * outputs,
        }  # fmt: skip
        costs = timed(lambda i, k=kernel, c=call: k(**c)[0])
        rows.append({"inputs": inputs, "outputs": outputs, "padding": padding, **costs})
    for outputs, inputs in ((64, 128), (64, 4096)):
        layers = layers_of(outputs, inputs, 0.5)[:8]
        for stripes in (1, 2):
            use(cut_of(2, 128, 2, (outputs, inputs), stripes))
            for one in layers:
                weights.kept(one).forget()
            rows.append({"shape": [outputs, inputs], "stripes": stripes, **sparse(layers, inputs)})
        rows.append({"shape": [outputs, inputs], "stock": stock(outputs, inputs)})
    for row in rows:
        print(row)
    return rows
