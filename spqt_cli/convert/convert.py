"""`spqt convert`: a checkpoint into a folder in the Zigzag layout, one tensor at a time.

It owns the order of the work: check, plan, write, publish. The output appears complete or not at all,
and an interrupted run goes on where it stopped. It knows no command line.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import psutil

from spqt_cli.convert import plan, plan_table, source, tokenizer_files
from spqt_cli.convert.job import Conversion, Progress
from spqt_cli.convert.plan import ZIGZAG, Plan
from spqt_cli.decode.bytes_read import Reads
from spqt_cli.errors import ResourceError, UsageError
from spqt_cli.format import checkpoint_files, layout, thresholds
from spqt_cli.system import files

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ConvertOptions:
    """What `convert` is asked for. dtype: of what stays floating; None keeps the model's own.

    skip: suffixes of layer paths to keep row-grouped. force: go on although memory looks short.
    zigzag_experts: of experts in 4-bit floats, too, which rounds them once more.
    head_bits, projections: as in `plan.Wishes`. profile: the share that will be skipped, for which layers
    that this device's profile runs faster row-grouped are stored so; None stores all in Zigzag.
    sparsity: the share that will be skipped, to tell what it can gain, and where that number is from; None
    for what calibrate chooses.
    """

    bits: int = 4
    group_size: int = 64
    dtype: str | None = None
    revision: str | None = None
    allow_requantize: bool = False
    zigzag_experts: bool = False
    trust_remote_code: bool = False
    force: bool = False
    dry_run: bool = False
    skip: tuple[str, ...] = ()
    head_bits: int | None = None
    projections: tuple[tuple[str, int, int], ...] = ()
    profile: float | None = None
    sparsity: float | None = None
    sparsity_from: str = "the preset's"


@dataclass(frozen=True)
class Step:
    """Work that would follow a conversion. name: fit or calibrate. said: what it does, for people.

    seconds: it would take on this machine, give or take a half. memory_bytes: of a fit, what the source's
    weights take while it writes text; else None.
    """

    name: str
    said: str
    seconds: float
    memory_bytes: int | None = None


@dataclass
class ConvertResult:
    """What was done, or with `dry_run` would be.

    zigzag_share: of the written weight bytes, 0 to 1. bytes: of all shards; source: the name and the bytes of
    the files that weights are read from. layers: Zigzag layers.
    rows: [layer, kind, bits, group size, bytes]. unquantized: layers whose inputs are no multiple of
    the group. reads: what a token reads, and what of it is always read. resumed: tensors taken over from
    an interrupted run. then: of a dry run, what would follow.
    """

    output: Path
    dry_run: bool
    zigzag_share: float
    bytes: int
    memory_bytes: int
    layers: int
    unquantized: list[str]
    warnings: list[str]
    rows: list[tuple[str, str, int, int, int]] = field(repr=False)
    reads: Reads
    source: tuple[str, int]
    resumed: int = 0
    then: list[Step] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for people; those of a dry run fit 80 columns."""
        share, size = f"{self.zigzag_share:.0%}", f"{self.bytes / 1e6:.1f} MB"
        lines = [f"{self.output} has {self.layers} Zigzag layers, {share} of {size} of weights"]
        if self.dry_run:
            lines = [*plan_table.lines(self.rows), "", *self._before_and_after(share)]
        lines += self.reads.lines()
        if self.unquantized:
            lines.append(
                f"not quantized, inputs no multiple of the group: {checkpoint_files.named(self.unquantized)}"
            )
        if self.reads.skippable < 0.5:
            lines.append("warning: less than half of what a token reads can be skipped; expect little speed")
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"then {step.name}: {step.said}" for step in self.then]
        return "\n".join(plan_table.wrapped(lines) if self.dry_run else lines)

    def _before_and_after(self, share: str) -> list[str]:
        name, size = self.source
        return [
            f"before {size / 1e6:10.1f} MB  {name}",
            f"after  {self.bytes / 1e6:10.1f} MB  {self.output.name}: {share} in {self.layers} Zigzag layers",
            f"memory {self.memory_bytes / 1e6:10.1f} MB  needed to convert",
        ]


def default_output(source_name: str, options: ConvertOptions) -> Path:
    """The folder that convert writes when none is named: NAME-spqt-4bit in the working directory."""
    path = files.expanded(source_name)
    name = path.resolve().name if path.exists() else source_name.rstrip("/").split("/")[-1]
    return Path(f"{name.removesuffix('.gguf')}-spqt-{options.bits}bit")


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run knows. weights: by the model's names, lazy; their values may not be there."""

    result: ConvertResult
    checkpoint: source.Checkpoint
    plan: Plan
    weights: dict[str, mx.array]


def rehearse(source_name: str, output: Path, options: ConvertOptions) -> Rehearsal:
    """All of a conversion that reads no weights and writes nothing. Raises what `convert` would."""
    check_options(options)
    trust = source.Trust(options.trust_remote_code, options.allow_requantize, options.zigzag_experts)
    checkpoint = source.open_source(source_name, options.revision, trust, headers_only=True)
    planned, weights, _ = _plan(checkpoint, options)
    tokenizer_files.rehearse(checkpoint)
    result = _result(files.expanded(output).absolute(), planned, checkpoint, options)
    return Rehearsal(result, checkpoint, planned, weights)


def convert(
    source_name: str, output: Path, options: ConvertOptions, on_progress: Progress | None = None
) -> ConvertResult:
    """Convert a folder, hub id or .gguf file into the folder `output`; see ConvertResult.

    on_progress: called with (bytes done, bytes in all, tensor) after each tensor.
    Raises SpqtError and its kinds; then nothing stands at `output`.
    """
    if options.dry_run:
        return rehearse(source_name, output, options).result
    check_options(options)
    output = files.expanded(output).absolute()
    trust = source.Trust(options.trust_remote_code, options.allow_requantize, options.zigzag_experts)
    local = files.expanded(source_name)
    files.check_target(output, local)
    with files.claim(output):
        files.check_target(output, local)
        checkpoint = source.open_source(source_name, options.revision, trust)
        planned, weights, wishes = _plan(checkpoint, options)
        tokenizer_files.rehearse(checkpoint)
        _check_memory(planned, options)
        conversion = Conversion(output, checkpoint, planned, wishes)
        resumed = conversion.write(weights, on_progress or (lambda done, total, name: None))
        conversion.publish()
    result = _result(output, planned, checkpoint, options)
    result.resumed = resumed
    return result


def _plan(
    checkpoint: source.Checkpoint, options: ConvertOptions
) -> tuple[Plan, dict[str, mx.array], plan.Wishes]:
    """The plan, the lazy tensors, and the wishes that it follows."""
    wishes = _wishes(options)
    planned, weights = plan.make(checkpoint, wishes)
    if options.profile is None:
        return planned, weights, wishes
    from spqt_cli.backends import select
    from spqt_cli.convert import parameters
    from spqt_cli.decode import profile

    sizes = {
        unit.path: profile.Size(outputs, inputs, unit.bits, unit.group_size)
        for unit in planned.units
        if unit.kind == ZIGZAG
        if weights[unit.name].ndim == 2  # a profile knows no experts
        for outputs, inputs in [weights[unit.name].shape]
    }
    traces = select.backend().traces  # else the model need not be built
    staying = profile.traced_blocks(parameters.load(checkpoint)[0]) if traces else ()
    rows = profile.better_as_rows(sizes, 1 - options.profile, staying)
    wishes = dataclasses.replace(wishes, skip=(*wishes.skip, *rows))
    return *plan.make(checkpoint, wishes), wishes


def check_options(options: ConvertOptions) -> None:
    """Refuse values outside their range (exit 2)."""
    settings = [(bits, group_size) for _, bits, group_size in options.projections]
    head_bits = options.bits if options.head_bits is None else options.head_bits
    for bits, group_size in [(options.bits, options.group_size), (head_bits, options.group_size), *settings]:
        layout.check(bits, group_size)
    thresholds.check_sparsity(options.profile, f"--profile {options.profile}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r} does not exist", f"use one of {DTYPES}")


def _check_memory(planned: Plan, options: ConvertOptions) -> None:
    free, needed = psutil.virtual_memory().available, planned.memory_bytes
    if free < needed and not options.force:
        raise ResourceError(
            f"{free / 1e9:.1f} GB of memory are free, converting needs {needed / 1e9:.1f} GB",
            "close other programs, or go on with --force",
        )


def _wishes(options: ConvertOptions) -> plan.Wishes:
    return plan.Wishes(
        bits=options.bits,
        group_size=options.group_size,
        dtype=options.dtype,
        skip=tuple(options.skip),
        head_bits=options.head_bits,
        projections=tuple(options.projections),
    )


def _too_few_bits(planned: Plan) -> list[str]:
    """A line for people where Zigzag layers have fewer than 4 bits (docs/quality.md has the measurement)."""
    fewest = min(unit.bits for unit in planned.units if unit.kind == ZIGZAG)
    if fewest >= 4:
        return []
    return [
        f"{fewest}-bit Zigzag loses more quality than {fewest}-bit row-grouped weights do; "
        "4 bits and a higher --sparsity read as little and keep more: --q-bits 4"
    ]


def _expected(planned: Plan, options: ConvertOptions) -> tuple[float, str]:
    """The share that will be skipped, and where that number is from."""
    if options.profile is not None:
        return options.profile, "as given by --profile"
    if options.sparsity is not None:
        return options.sparsity, options.sparsity_from
    return thresholds.default_sparsity(planned.weights), "calibrate's default for this size"


def _result(
    output: Path, planned: Plan, checkpoint: source.Checkpoint, options: ConvertOptions
) -> ConvertResult:
    rows = [(u.name, u.kind, u.bits, u.group_size, u.written_bytes) for u in planned.units]
    layers = sum(unit.kind == ZIGZAG for unit in planned.units)
    return ConvertResult(
        output=output,
        dry_run=options.dry_run,
        zigzag_share=planned.zigzag_share,
        bytes=planned.written_bytes,
        memory_bytes=planned.memory_bytes,
        layers=layers,
        unquantized=planned.unquantized,
        warnings=[*checkpoint.warnings, *_too_few_bits(planned)],
        rows=rows,
        reads=planned.account(*_expected(planned, options)),
        source=(checkpoint.repo or checkpoint.name, sum(path.stat().st_size for path in checkpoint.files())),
    )
