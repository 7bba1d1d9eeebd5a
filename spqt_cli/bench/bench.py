"""Tokens per second of a whole model: stock mlx-lm and Zigzag at several sparsities, in one interleaved run.

The loop is mlx-lm's own `generate_step`, so Python's part of a token is in every figure. In each
repetition every variant runs once, one after another, so that a drift of the machine meets all alike.
model_timing.py holds the clock, models.py makes the models, kernel_timing.py is the kernel level.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from spqt_cli.bench import hardware, kernel_timing, model_timing, models, projections, shapes
from spqt_cli.bench.models import Subject
from spqt_cli.bench.results import Crossover, KernelRow, ModelRow, Report
from spqt_cli.decode import context, parallel, profile
from spqt_cli.errors import UsageError
from spqt_cli.format import config_json, layout, thresholds

UNSTEADY = 0.15  # relative spread of the typical row from which on figures are doubtful
KERNEL_REPETITIONS = 3  # samples of a kernel for one of a model: they are short
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Options:
    """What to measure. model: a converted folder or hub id; or shape: a name from shapes.py.

    None leaves prompt_tokens (lengths of prompts), generation_tokens and repetitions to the device: a
    CPU does less.
    blocks: of the shape's transformer blocks. bits, group_size, dtype: of random weights.
    delay_seconds: rest between repetitions. commit: where git can't tell it. processes: those that run the
    models together; each measures, and the first one's figures count.
    """

    model: str | None = None
    shape: str | None = None
    sparsities: Sequence[float] = (0.25, 0.5)
    depths: Sequence[int] = (0,)
    prompt_tokens: Sequence[int] | None = None
    generation_tokens: int | None = None
    repetitions: int | None = None
    blocks: int | None = None
    bits: int = 4
    group_size: int = 64
    dtype: str | None = None
    delay_seconds: float = 0.0
    commit: str | None = None
    processes: parallel.Processes | None = None

    def complete(self) -> "Options":
        """These options with the device's defaults filled in; raises UsageError for nonsense."""
        cpu = mx.default_device().type == mx.DeviceType.cpu
        names = ("prompt_tokens", "generation_tokens", "repetitions")
        defaults: tuple[Any, ...] = ((16,), 8, 3) if cpu else ((512,), 64, 5)
        missing = {
            name: value for name, value in zip(names, defaults, strict=True) if getattr(self, name) is None
        }
        options = dataclasses.replace(self, **missing)
        _check(options)
        return options


def _check(options: Options) -> None:
    if (options.model is None) == (options.shape is None):
        raise UsageError("give either a model or --shape", f"shapes: {', '.join(shapes.names())}")
    if options.blocks is not None and options.shape is None:
        raise UsageError("--blocks goes with --shape", "a converted model is measured whole")
    if (options.repetitions or 0) < 2:
        raise UsageError("one sample says nothing about its spread", "use --repetitions 2 or more")
    if (options.generation_tokens or 0) < 2 or any(tokens < 1 for tokens in options.prompt_tokens or ()):
        raise UsageError("too few tokens to time", "--generation-tokens 2 or more, --prompt-tokens 1 or more")
    if any(depth < 0 for depth in options.depths):
        raise UsageError("a context depth is below 0", "for example --depth 0,4096")
    if options.dtype not in (None, "float16", "bfloat16", "float32"):
        raise UsageError(f"--dtype {options.dtype!r} does not exist", "float16, bfloat16 or float32")
    layout.check(options.bits, options.group_size)
    for sparsity in options.sparsities:
        thresholds.check_sparsity(sparsity)


def run(
    options: Options, on_progress: Progress = lambda *_: None, peers: Sequence[model_timing.Peer] = ()
) -> Report:
    """Measure prompt and decode speed of every variant, and of other programs, at every depth."""
    asked, options = options, options.complete()
    on_progress(0, 1, "making the models")
    subject = make_subject(options)
    options, shortened = _within(context.kept_to(subject.config), asked, options)
    copy = hardware.copy_bandwidth()
    runs = model_timing.Runs(subject, options.sparsities, hardware.Energy(), copy, peers)
    by_test: list[list[ModelRow]] = []
    tests = list(_tests(options))
    for at, test in enumerate(tests):
        show = partial(_show, on_progress, at, len(tests))
        by_test.append(runs.run(test, options.repetitions or 0, show, options.delay_seconds))
    runs.notes += [*shortened, *(peer.note for peer in peers)]
    runs.notes.append(runs.host.note([quiet for rows in by_test for quiet in runs.judge(rows)]))
    machine = {**hardware.describe(options.commit), "copy_gb_per_s": round(copy / 1e9, 1)}
    machine |= {"energy": runs.energy.source, "host_loop_us": round(runs.host.fastest_us, 1)}
    rows = [row for of_test in by_test for row in of_test]
    return Report(machine, _settings(options, subject), rows, [], runs.notes)


def _within(limit: int | None, asked: Options, options: Options) -> tuple[Options, list[str]]:
    """(the options with prompts of default length no longer than the model is kept to, a note of it).

    Raises UsageError where what was asked goes beyond.
    """
    tests = list(_tests(options))
    if limit is None or not tests or _longest(tests) <= limit:
        return options, []
    if asked.prompt_tokens is None and (left := limit - max(options.depths) - 1) > 0:
        shorter = dataclasses.replace(options, prompt_tokens=(min(left, *(options.prompt_tokens or ())),))
        if _longest(list(_tests(shorter))) <= limit:
            return shorter, [f"prompts of {left} tokens: the model's context is {limit}"]
    raise UsageError(
        f"{_longest(tests)} tokens at the greatest depth, the model's context is {limit}",
        "lower --depth, --prompt-tokens or --generation-tokens",
    )


def _longest(tests: Sequence[model_timing.Test]) -> int:
    """The tokens of the longest test: decoding has a prompt of one, a prompt an answer of one."""
    return max(test.depth + 1 + test.tokens + test.decodes * model_timing.WARM_TOKENS for test in tests)


def _tests(options: Options) -> Iterator[model_timing.Test]:
    for depth in options.depths:
        for tokens in options.prompt_tokens or ():
            yield model_timing.Test("prompt", tokens, depth)
        yield model_timing.Test("decode", options.generation_tokens or 0, depth)


def _show(on_progress: Progress, at: int, tests: int, share: float, what: str) -> None:
    on_progress(at + share, tests, what)


def run_kernels(options: Options, on_progress: Progress = lambda *_: None) -> Report:
    """Measure every kind of projection alone, and find the densities where sparse stops paying."""
    options = options.complete()
    model, name = _lazy_model(options)
    found = projections.works(model, models.compute_dtype(model))
    copy = hardware.copy_bandwidth()
    repetitions = KERNEL_REPETITIONS * (options.repetitions or 0)
    rows: list[KernelRow] = []
    crossovers: list[Crossover] = []
    links = []
    for at, work in enumerate(found):
        on_progress(at, len(found), f"{work.name} {work.shape}")
        more, crossing, link = kernel_timing.measure(work, options.sparsities, repetitions, copy)
        rows += more
        crossovers.append(crossing)
        links.append(link)
        mx.clear_cache()
    machine = {**hardware.describe(options.commit), "copy_gb_per_s": round(copy / 1e9, 1)}
    settings = {"model": name, "weights": "random", **models.packing(model), "repetitions": repetitions}
    notes = [f"every time holds the link of the chain, {min(links):.1f} to {max(links):.1f} us when alone"]
    report = Report(machine, settings, rows, crossovers, notes)
    if (busy := unsteadiness(report)) > UNSTEADY:
        notes.append(f"times spread by {busy:.0%}: the machine was busy, measure again when it is idle")
    return report


def unsteadiness(report: Report) -> float:
    """The typical standard deviation of a kernel report's times, as a fraction of their mean."""
    rows = [row for row in report.rows if isinstance(row, KernelRow)]
    return statistics.median(row.time.spread / row.time.mean for row in rows)


def write_profile(report: Report) -> str:
    """Store the crossovers of a kernel report as this device's profile; says where."""
    choices = {one.key: profile.Choice(one.sparse_below, one.otherwise) for one in report.crossovers}
    return str(profile.write(choices, {**report.machine, **report.settings}))


def _lazy_model(options: Options) -> tuple[nn.Module, str]:
    """(a model whose weights are not computed, its name)."""
    if options.model is not None:
        return models.lazy_model(options.model), Path(options.model).name
    assert options.shape is not None
    config = shapes.config(options.shape, blocks=1)
    dtype = models.stored_dtype(config, options.dtype)
    return models.random_model(config, options.bits, options.group_size, dtype), options.shape


def make_subject(options: Options) -> Subject:
    """The models that `options` name."""
    processes = options.processes
    if options.model is not None:
        return models.loaded_subject(options.model, processes)
    assert options.shape is not None
    config = shapes.config(options.shape, options.blocks)
    dtype = models.stored_dtype(config, options.dtype)
    form = options.bits, options.group_size, dtype
    return models.random_subject(options.shape, config, *form, processes=processes)


def _settings(options: Options, subject: Subject) -> dict[str, Any]:
    blocks = config_json.size(subject.config, "num_hidden_layers")
    found = {
        "model": subject.name, "blocks": blocks, **subject.settings, "repetitions": options.repetitions,
    }  # fmt: skip
    if options.processes is not None:
        found |= {"processes": options.processes.size, "parallel": options.processes.how}
    return found
