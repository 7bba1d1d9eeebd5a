"""`spqt convert`: a checkpoint into a folder in the Zigzag layout, one tensor at a time.

It owns the order of the work: check, plan, quantize and write, publish. The output appears complete
or not at all, and an interrupted run goes on where it stopped. It knows no command line.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from spqt_cli import __version__, card, checks, files, format, identity, layout, plan, shards, source
from spqt_cli.errors import ResourceError, SpqtError, UsageError
from spqt_cli.journal import Journal, job_id
from spqt_cli.plan import PLAIN, ROWS, ZIGZAG, Plan, Unit
from spqt_cli.shards import Shard, Writer

Progress = Callable[[float, float, str], None]
DTYPES = ("float16", "bfloat16", "float32")
SMALL_FILES_BYTES = 4 << 20  # config, index, card, journal, beside weights and tokenizer
CHECKED_AT_ONCE = 1 << 22  # elements per step of the search for NaN and Inf


@dataclass(frozen=True)
class ConvertOptions:
    """What `convert` is asked for. dtype: of what stays floating; None keeps the model's own.

    skip: suffixes of layer paths to keep row-grouped. force: go on although memory looks short.
    """

    bits: int = 4
    group_size: int = 64
    dtype: str | None = None
    revision: str | None = None
    allow_requantize: bool = False
    trust_remote_code: bool = False
    force: bool = False
    dry_run: bool = False
    skip: tuple[str, ...] = ()


@dataclass
class ConvertResult:
    """What was done, or with `dry_run` would be.

    zigzag_share: of the written weight bytes, 0 to 1. bytes: of all shards. layers: Zigzag layers.
    rows: [layer, kind, bits, group size, bytes]. unquantized: layers whose inputs are no multiple of
    the group. resumed: tensors taken over from an interrupted run.
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
    resumed: int = 0

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{name:<50} {kind:<12} {bits or '':>2} {group or '':>4} {size / 1e6:>9.2f} MB"
                 for name, kind, bits, group, size in (self.rows if self.dry_run else ())]  # fmt: skip
        verb = "would have" if self.dry_run else "has"
        lines.append(
            f"{self.output} {verb} {self.layers} Zigzag layers, {self.zigzag_share:.0%} of "
            f"{self.bytes / 1e6:.1f} MB of weights"
        )
        if self.dry_run:
            lines.append(f"memory needed: {self.memory_bytes / 1e9:.2f} GB")
        if self.unquantized:
            lines.append(f"not quantized, inputs no multiple of the group: {checks.named(self.unquantized)}")
        if self.zigzag_share < 0.5:
            lines.append("warning: less than half of the weights can be skipped; expect little speed")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def default_output(source_name: str, options: ConvertOptions) -> Path:
    """The folder that convert writes when none is named: NAME-spqt-4bit in the working directory."""
    path = Path(source_name).expanduser()
    name = path.resolve().name if path.exists() else source_name.rstrip("/").split("/")[-1]
    return Path(f"{name.removesuffix('.gguf')}-spqt-{options.bits}bit")


def convert(
    source_name: str, output: Path, options: ConvertOptions, on_progress: Progress | None = None
) -> ConvertResult:
    """Convert a folder, hub id or .gguf file into the folder `output`; see ConvertResult.

    on_progress: called with (bytes done, bytes in all, tensor) after each tensor.
    Raises SpqtError and its kinds; then nothing stands at `output`.
    """
    check_options(options)
    output = output.expanduser().absolute()
    trust = source.Trust(options.trust_remote_code, options.allow_requantize)
    if options.dry_run:
        checkpoint = source.open_source(source_name, options.revision, trust, headers_only=True)
        planned, _ = plan.make(checkpoint, _wishes(options))
        return _result(output, planned, checkpoint, options)
    local = Path(source_name).expanduser()
    files.check_target(output, local)
    with files.claim(output):
        files.check_target(output, local)
        checkpoint = source.open_source(source_name, options.revision, trust)
        planned, weights = plan.make(checkpoint, _wishes(options))
        run = _Run(output, checkpoint, planned, options)
        resumed = run.write(weights, on_progress or (lambda done, total, name: None))
        run.publish()
    result = _result(output, planned, checkpoint, options)
    result.resumed = resumed
    return result


def check_options(options: ConvertOptions) -> None:
    """Refuse values outside their range (exit 2)."""
    if options.bits not in layout.BITS:
        raise UsageError(f"{options.bits} bits: not a width that MLX packs", f"use one of {layout.BITS}")
    if options.group_size not in layout.GROUP_SIZES:
        raise UsageError(
            f"group size {options.group_size} does not exist", f"use one of {layout.GROUP_SIZES}"
        )
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r} does not exist", f"use one of {DTYPES}")


def _wishes(options: ConvertOptions) -> plan.Wishes:
    return plan.Wishes(options.bits, options.group_size, options.dtype, tuple(options.skip))


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
        warnings=checkpoint.warnings,
        rows=rows,
    )


class _Run:
    """One conversion: a work folder, its journal, and the shards in it."""

    def __init__(
        self, output: Path, checkpoint: source.Checkpoint, planned: Plan, options: ConvertOptions
    ) -> None:
        self.output, self.checkpoint, self.plan = output, checkpoint, planned
        self.config = _config(checkpoint, planned)
        # The content's hash is known last; until then a stand-in of its length holds the place.
        stand_in = identity.metadata(self.config["spqt"]["fingerprint"], "0" * 64)
        self.shards: list[Shard] = shards.lay_out(planned.units, stand_in)
        self._check_memory(options)
        wishes = dataclasses.asdict(_wishes(options))
        job = job_id({"config": self.config, "stamps": checkpoint.stamps(), "wishes": wishes})
        self.work = self._work_folder(job)
        self.folder = self.work / "model"
        with files.disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        present = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        extra = SMALL_FILES_BYTES + sum(path.stat().st_size for path in checkpoint.kept_files())
        files.check_space(self.work, planned.written_bytes + extra - present)
        self.journal = Journal(self.work, job)

    def _check_memory(self, options: ConvertOptions) -> None:
        free, needed = psutil.virtual_memory().available, self.plan.memory_bytes
        if free < needed and not options.force:
            raise ResourceError(
                f"{free / 1e9:.1f} GB of memory are free, converting needs {needed / 1e9:.1f} GB",
                "close other programs, or go on with --force",
            )

    def _work_folder(self, job: str) -> Path:
        """The folder of an interrupted run of the same job, or a new one."""
        for folder in files.work_folders(self.output):
            if Journal.belongs(folder, job):
                return folder
            self.checkpoint.warnings.append(f"{folder} is left from another conversion; delete it")
        return files.new_work_folder(self.output)

    def write(self, weights: dict[str, mx.array], on_progress: Progress) -> int:
        """Write every tensor's parts and consume `weights`; the number taken over from an earlier run."""
        done, total, resumed = 0, self.plan.source_bytes, 0
        with Writer(self.folder, self.shards) as writer:
            for unit in self.plan.units:
                array = weights.pop(unit.name)
                if self._is_done(unit, writer):
                    resumed += 1
                else:
                    self.checkpoint.check_unchanged()
                    self.journal.note(unit.name, self._write_unit(unit, array, writer))
                    mx.clear_cache()
                del array
                done += unit.nbytes
                on_progress(done, total, unit.name)
            self.checkpoint.check_unchanged()
            hashes = [h for unit in self.plan.units for h in self.journal.done[unit.name]]
            content = hashlib.sha256("".join(hashes).encode()).hexdigest()
            self.config["spqt"]["content"] = content
            writer.write_headers(identity.metadata(self.config["spqt"]["fingerprint"], content))
        return resumed

    def _is_done(self, unit: Unit, writer: Writer) -> bool:
        """True if an earlier run wrote the unit and its bytes are still the noted ones."""
        noted = self.journal.done.get(unit.name)
        if noted is None:
            return False
        for part, wanted in zip(unit.parts, noted, strict=True):
            found = hashlib.sha256()
            for piece in writer.read(part):
                found.update(piece)
            if found.hexdigest() != wanted:  # a power cut kept the journal and lost the data
                self.journal.forget(unit.name)
                return False
        return True

    def _write_unit(self, unit: Unit, array: mx.array, writer: Writer) -> list[str]:
        """Quantize one tensor and write its parts; their SHA-256."""
        if self.checkpoint.gguf is not None:
            array = self.checkpoint.read(str(unit.source))
        mx.eval(array)
        if not _is_finite(array):
            name = self._blame(unit)
            raise SpqtError(f"{self.checkpoint.name}: tensor {name} holds NaN or Inf", checks.AGAIN)
        if array.dtype != unit.dtype:
            array = array.astype(unit.dtype)
            mx.eval(array)
        if unit.dtype == mx.float16 and not _is_finite(array):
            raise SpqtError(f"tensor {unit.source or unit.name} does not fit float16", "--dtype bfloat16")
        hashes = [hashlib.sha256() for _ in unit.parts]
        offsets = [0 for _ in unit.parts]
        for pieces in _encoded(unit, array):
            mx.eval(*pieces)
            if unit.kind != PLAIN and not all(_is_finite(piece) for piece in pieces[1:]):
                raise SpqtError(f"tensor {unit.name}: its scales overflow {unit.dtype}", "--dtype float32")
            for i, piece in enumerate(pieces):
                data = shards.raw(piece)
                hashes[i].update(data)
                writer.write(unit.parts[i].name, offsets[i], data)
                offsets[i] += data.nbytes
        return [each.hexdigest() for each in hashes]

    def _blame(self, unit: Unit) -> str:
        """The name, in the checkpoint, of the tensor that made a unit not finite."""
        if unit.source is not None:
            return unit.source
        lazy = self.checkpoint.weights()
        for name in list(lazy):
            if mx.issubdtype(lazy[name].dtype, mx.floating) and not _is_finite(lazy.pop(name)):
                return name
        return unit.name

    def publish(self) -> None:
        """Add all but the weights, make everything durable, and give the folder its name."""
        for path in self.checkpoint.kept_files():
            files.copy(path, self.folder / path.name)
        card.clean_tokenizer_config(self.folder)
        self.config["spqt"]["shards"] = {
            shard.name: files.sha256(self.folder / shard.name) for shard in self.shards
        }
        identity.write_index(self.folder, self.shards)
        files.write_text(self.folder / card.NAME, card.text(self.config, self.checkpoint, self.plan))
        with files.disk_errors(self.folder):
            format.write_config(self.folder, self.config)
        if self.checkpoint.gguf is not None:
            from spqt_cli import gguf

            gguf.write_tokenizer(self.checkpoint.files()[0], self.folder)
        files.publish(self.folder, self.output)
        with files.disk_errors(self.work):
            shutil.rmtree(self.work)


def _config(checkpoint: source.Checkpoint, planned: Plan) -> dict[str, Any]:
    """config.json of the output, complete but for the hashes."""
    dropped = ("_name_or_path", "quantization", "quantization_config", *source.CODE_KEYS)
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    if not planned.keep_vision_config:  # as mlx-lm's own save does
        config.pop("vision_config", None)
    if planned.dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = planned.dtype
    config["quantization"] = planned.quantization
    config["spqt"] = {
        "format_version": format.FORMAT_VERSION,
        "fingerprint": format.fingerprint(config),
        "source": checkpoint.identity(),
        "versions": {"spqt": __version__, "mlx": mx.__version__},
    }
    return config


def _is_finite(array: mx.array) -> bool:
    """True if no element is NaN or Inf; in steps, so that the search takes little memory."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return True
    flat = array.reshape(-1)
    steps = range(0, flat.size, CHECKED_AT_ONCE)
    return all(mx.isfinite(flat[i : i + CHECKED_AT_ONCE]).all().item() for i in steps)


def _encoded(unit: Unit, array: mx.array) -> Iterator[tuple[mx.array, ...]]:
    """A unit's parts in pieces, in the order of their bytes; Zigzag band by band to save memory."""
    if unit.kind == ROWS:
        yield tuple(mx.quantize(array, group_size=unit.group_size, bits=unit.bits))
    elif unit.kind == PLAIN:
        yield (array,)
    else:
        for start in range(0, array.shape[0], unit.band):
            yield layout.quantize(array[start : start + unit.band], unit.bits, unit.group_size, unit.band)
