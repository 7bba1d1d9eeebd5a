"""Launches of the GPU kernel for one row: other cuts, what one costs by itself, and what collecting takes.

    python -m benchmarks.gpu sweep OUTPUTS INPUTS
    python -m benchmarks.gpu overhead
    python -m benchmarks.gpu collector

benchmarks/gpu.py says what a measurement is, and makes the matrices.
"""

import itertools
from typing import Any

import mlx.core as mx

from benchmarks.gpu import layers_of, random_packed, set_density, sparse, stock, timed
from spqt_cli.backends.gpu import first_use as checks
from spqt_cli.backends.gpu import geometry, launch, plans, weights
from spqt_cli.backends.gpu.kernel_text import Kernel
from spqt_cli.backends.gpu.settings import LaunchSettings
from spqt_cli.format import layout

# The stand-alone collector of the paper, one threadgroup: indices, values and the number of active channels.
COLLECTOR = """
const uint lane = thread_position_in_threadgroup.x;
uint total = 0;
for (uint first = 0; first < settings[0]; first += 1024) {
  const uint k = first + lane;
  const bool kept = k < settings[0] && !(fabs(float(x[k])) < as_type<float>(settings[1]));
  const uint before = simd_prefix_exclusive_sum(uint(kept));
  if (thread_index_in_simdgroup == 31) {
    simdgroup_count[simdgroup_index_in_threadgroup] = before + uint(kept);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint at = total + before;
  for (uint group = 0; group < 32; ++group) {
    at += group < simdgroup_index_in_threadgroup ? simdgroup_count[group] : 0;
    total += simdgroup_count[group];
  }
  if (kept) {
    indices[at] = k;
    values[at] = x[k];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (lane == 0) {
  count[0] = total;
}
"""
FEW, MANY = 16, 64  # times the channels: the slope is free of what a launch costs
DENSITIES = (0.5, 1.0)  # of `sweep`


def use(cut: geometry.Geometry) -> None:
    """Launches with this geometry instead of the rule's."""
    geometry.choose = lambda *_: cut
    checks.verdict = lambda *_, **__: (
        ""
    )  # a sweep meets many variants; `doctor --selftest` covers what is shipped


def candidates(outputs: int, inputs: int) -> list[geometry.Geometry]:
    """Cuts around the rule's: rows, channels in flight, threadgroups, wider lanes, decoders."""
    units = -(-layout.band_of(outputs, 64) // 32)
    lanes = -(-units // -(-units // 32))
    cuts = []
    for rows, unroll, groups in itertools.product((8, 16), (2, 4, 6), (128, 264)):
        if rows * unroll <= 64:
            cuts.append(cut_of(lanes, rows, unroll, (outputs, inputs), groups))
    cuts += [cut_of(lanes, 8, unroll, (outputs, inputs), 264, padded=1) for unroll in (2, 4)]
    cuts += [cut_of(lanes, 8, 4, (outputs, inputs), 128, decode=decode) for decode in (0, 1, 3)]
    cuts += [cut_of(-(-lanes // 2), 16, unroll, (outputs, inputs), 128, outputs=64) for unroll in (1, 2)]
    return list(dict.fromkeys(cuts))


def cut_of(
    lanes: int, rows: int, unroll: int, shape: tuple[int, int], groups: int, **more: int
) -> geometry.Geometry:
    outputs, inputs = shape
    settings = {"outputs": 32, "slice": 8, "decode": 2, "padded": 0, **more}
    band = layout.band_of(outputs, 64)
    tiles = -(-band // (lanes * settings["outputs"])) * -(-outputs // band)
    stripe = -(-inputs // max(1, groups // tiles))
    threads = -(-lanes * rows // 32) * 32
    collected = threads * max(1, min(8192 // threads, 32, -(-stripe // threads)))
    return geometry.Geometry(lanes=lanes, rows=rows, unroll=unroll, list=collected, stripe=stripe, **settings)


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
        form += f" padded {cut.padded}"
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


def collecting(inputs: int) -> launch.Launch:
    """The stand-alone collector for x of `inputs` channels."""
    shared = "threadgroup" if mx.metal.is_available() else "__shared__"
    body = f"{shared} uint simdgroup_count[32];\n{COLLECTOR}"
    kernel = Kernel("collect", ("x", "settings"), ("indices", "values", "count"), (), (), "", body, 1024)
    return launch.Launch(kernel, (1, 1), [(inputs,), (inputs,), (1,)], [mx.uint32, mx.float16, mx.uint32])


def collector() -> list[dict[str, Any]]:
    """Microseconds that collecting takes inside the fused kernel, and in a kernel of its own.

    Nothing is active, so no weight is read. Small launches wait for the host; therefore x is made FEW and
    MANY times as long with as many threadgroups, and the difference is the GPU's time for one length.
    """
    rows = []
    for outputs, inputs in ((28672, 8192), (14336, 4096), (4096, 14336)):
        layer = random_packed(outputs, inputs, layout.band_of(outputs, 64), 0.5)
        plan = launch.make_plan(
            (1, 1, inputs), mx.float16, [layer], plans.choose([layer], mx.float16), launch.Form()
        )
        mx.eval(plan.inputs)
        row: dict[str, Any] = {"shape": [outputs, inputs], "threadgroups": plan.gemv.threadgroups}
        for times in (0, 1, FEW, MANY):
            x = mx.zeros((1, 1, inputs * max(times, 1)), mx.float16)
            mx.eval(x)
            row[f"fused_{times}"] = timed(longer(plan, x, times))["us"]
            row[f"alone_{times}"] = timed(alone(x, inputs * times))["us"]
        for kind in ("fused", "alone"):
            row[f"{kind}_us"] = round((row[f"{kind}_{MANY}"] - row[f"{kind}_{FEW}"]) / (MANY - FEW), 3)
        rows.append(row)
        print(row)
    return rows


def longer(plan: Any, x: mx.array, times: int) -> Any:
    """Calls of the fused kernel on x as if inputs and stripes were `times` as long; all is inactive."""
    numbers: list[int] = plan.inputs[0].tolist()
    inputs, stripe = map(LaunchSettings._fields.index, ("inputs", "stripe"))
    numbers[inputs], numbers[stripe] = numbers[inputs] * times, numbers[stripe] * max(times, 1)
    settings = mx.array(numbers, dtype=mx.uint32)
    mx.eval(settings)
    stretched = plan._replace(inputs=[settings, *plan.inputs[1:]])
    return lambda _: launch.launch(x, stretched)[0][0]


def alone(x: mx.array, inputs: int) -> Any:
    """Calls of the stand-alone collector on x; a threshold of 1 over zeros keeps nothing."""
    numbers = mx.concatenate([mx.array([inputs], mx.uint32), mx.array([1.0]).view(mx.uint32)])
    settings = mx.concatenate([numbers, mx.zeros(6, mx.uint32)])  # eight: fewer would be `constant` on Metal
    mx.eval(settings)
    kernel = collecting(x.size)
    return lambda _: launch.run(kernel, [x, settings])[2]
