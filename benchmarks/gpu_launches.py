"""What stands around the product: the check before a kernel's first use, and collecting; see bench_gpu.py."""

import os
import tempfile
import time
from typing import Any

import mlx.core as mx
from gpu_common import Packed, random_packed, timed

from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use as trust
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.kernel_text import Kernel
from spqt_cli.format import layout

# Launches of one block of an 8B model: name, outputs of each projection, inputs.
BLOCK = [
    ("q/k/v", (4096, 1024, 1024), 4096),
    ("o", (4096,), 4096),
    ("gate/up", (14336, 14336), 4096),
    ("down", (4096,), 14336),
]
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
KINDS = {"sparse": False, "dense": True}  # with thresholds, and without
FEW, MANY = 16, 64  # times the channels: the slope is free of what a launch costs


def collecting(inputs: int) -> launching.Launch:
    """The stand-alone collector for x of `inputs` channels."""
    shared = "threadgroup" if mx.metal.is_available() else "__shared__"
    body = f"{shared} uint simdgroup_count[32];\n{COLLECTOR}"
    kernel = Kernel("collect", ("x", "settings"), ("indices", "values", "count"), (), (), "", body, 1024)
    return launching.Launch(kernel, (1, 1), [(inputs,), (inputs,), (1,)], [mx.uint32, mx.float16, mx.uint32])


def first_use() -> list[dict[str, Any]]:
    """Seconds of the check of every variant that an 8B model needs, in three states of this process.

    `compiling`: nothing known, so each kernel is compiled; `checking`: compiled in this process, but no
    passed check remembered; `remembered`: the check has passed before.
    """
    groups = [
        (name, [random_packed(outputs, inputs, layout.band_of(outputs, 64), 0.5) for outputs in group])
        for name, group, inputs in BLOCK
    ]
    mx.eval([(one.weight, one.scales, one.biases, one.threshold) for _, layers in groups for one in layers])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what this machine remembers of earlier runs does not count
        for state in ("compiling", "checking", "remembered"):
            if state != "remembered":
                trust._passed.cache_clear()
                trust._file().unlink(missing_ok=True)
            rows += [checked(state, *group, kind) for group in groups for kind in KINDS]
            total = sum(row["seconds"] for row in rows if row["state"] == state)
            print(f"{state}: {total:.3f} s for {len(KINDS) * len(groups)} variants")
    return rows


def checked(state: str, name: str, layers: list[Packed], kind: str) -> dict[str, Any]:
    """One verdict, timed. Ends the program where a kernel is not right: its time would say nothing."""
    began = time.perf_counter()
    cut, form = gpu.choose(layers, mx.float16), launching.Form(KINDS[kind])
    plan = launching.make_plan((1, 1, layers[0].weight.shape[1]), mx.float16, layers, cut, form)
    reason = trust.verdict(plan, mx.float16, layers, cut)
    seconds = time.perf_counter() - began
    if reason:
        raise SystemExit(f"{name}: {reason}")
    print(f"  {state:10} {name:8} {kind:8} {seconds:.3f} s")
    return {"state": state, "launch": name, "kind": kind, "seconds": round(seconds, 4)}


def collector() -> list[dict[str, Any]]:
    """Microseconds that collecting takes inside the fused kernel, and in a kernel of its own.

    Nothing is active, so no weight is read. Small launches wait for the host; therefore x is made FEW and
    MANY times as long with as many threadgroups, and the difference is the GPU's time for one length.
    """
    rows = []
    for outputs, inputs in ((28672, 8192), (14336, 4096), (4096, 14336)):
        layer = random_packed(outputs, inputs, layout.band_of(outputs, 64), 0.5)
        plan = launching.make_plan(
            (1, 1, inputs), mx.float16, [layer], gpu.choose([layer], mx.float16), launching.Form()
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
    numbers[0], numbers[1] = numbers[0] * times, numbers[1] * max(times, 1)
    settings = mx.array(numbers, dtype=mx.uint32)
    mx.eval(settings)
    stretched = plan._replace(inputs=[settings, *plan.inputs[1:]])
    return lambda _: launching.launch(x, stretched)[0][0]


def alone(x: mx.array, inputs: int) -> Any:
    """Calls of the stand-alone collector on x; a threshold of 1 over zeros keeps nothing."""
    numbers = mx.concatenate([mx.array([inputs], mx.uint32), mx.array([1.0]).view(mx.uint32)])
    settings = mx.concatenate([numbers, mx.zeros(6, mx.uint32)])  # eight: fewer would be `constant` on Metal
    mx.eval(settings)
    launch = collecting(x.size)
    return lambda _: launching.run(launch, [x, settings])[2]
