"""One conversion at work: a work folder beside the target, a journal in it, shards written in place.

It writes what a plan says and publishes the folder; which plan, and whether to begin, is `convert`'s.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from spqt_cli.convert import card, encode, shards, source, tokenizer_files
from spqt_cli.convert.journal import Journal, job_id
from spqt_cli.convert.plan import Plan, Unit, Wishes
from spqt_cli.convert.shards import Writer
from spqt_cli.errors import AGAIN, SpqtError
from spqt_cli.format import config_json, contract
from spqt_cli.format.folder import shard_metadata
from spqt_cli.system import files
from spqt_cli.version import __version__

Progress = Callable[[float, float, str], None]
SMALL_FILES_BYTES = 4 << 20  # config, index, card, journal, beside weights and tokenizer


class Conversion:
    """A plan being carried out; `write`, then `publish`. Runs under `files.claim(output)`."""

    def __init__(self, output: Path, checkpoint: source.Checkpoint, planned: Plan, wishes: Wishes) -> None:
        self.output, self.checkpoint, self.plan = output, checkpoint, planned
        self.config = _config(checkpoint, planned)
        # The content's hash is known last; until then a stand-in of its length holds the place.
        stand_in = shard_metadata(self.config["spqt"]["fingerprint"], "0" * 64)
        self.shards = shards.lay_out(planned.units, stand_in, shards.LARGEST_SHARD)
        wanted = {"config": self.config, "stamps": checkpoint.stamps(), "wishes": dataclasses.asdict(wishes)}
        wanted["quantization"] = checkpoint.quantization  # how bytes are read; not in the output's config
        job = job_id(wanted)
        self.work = self._work_folder(job)
        self.folder = self.work / "model"
        with files.disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        present = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        extra = SMALL_FILES_BYTES + sum(path.stat().st_size for path in checkpoint.kept_files())
        files.check_space(self.work, planned.written_bytes + extra - present)
        self.journal = Journal(self.work, job)

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
                    self.journal.note(unit.name, self._write_unit(unit, array, writer))
                    mx.clear_cache()
                del array
                done += unit.nbytes
                on_progress(done, total, unit.name)
            hashes = [h for unit in self.plan.units for h in self.journal.done[unit.name]]
            content = hashlib.sha256("".join(hashes).encode()).hexdigest()
            self.config["spqt"]["content"] = content
            writer.write_headers(shard_metadata(self.config["spqt"]["fingerprint"], content))
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
        """Write one tensor's parts; their SHA-256."""
        self.checkpoint.check_unchanged()
        if self.checkpoint.gguf is not None:
            array = self.checkpoint.read(str(unit.source))
        hashes = [hashlib.sha256() for _ in unit.parts]
        offsets = [0 for _ in unit.parts]
        try:
            for index, data in encode.encode(unit, array):
                hashes[index].update(data)
                writer.write(unit.parts[index].name, offsets[index], data)
                offsets[index] += data.nbytes
        except encode.NotFinite:
            name = self._blame(unit)
            raise SpqtError(f"{self.checkpoint.name}: tensor {name} holds NaN or Inf", AGAIN) from None
        finally:
            self.checkpoint.check_unchanged()
        return [each.hexdigest() for each in hashes]

    def _blame(self, unit: Unit) -> str:
        """The name, in the checkpoint, of the tensor that made a unit not finite."""
        if unit.source is not None:
            return unit.source
        lazy = self.checkpoint.weights()
        return next((name for name in sorted(lazy) if not encode.is_finite(lazy.pop(name))), unit.name)

    def _sweep(self) -> None:
        """Remove what a run that died while publishing left beside the shards."""
        shard_names = {shard.name for shard in self.shards}
        for path in self.folder.iterdir():
            if path.name not in shard_names:
                with files.disk_errors(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self) -> None:
        """Add all but the weights, make everything durable, and give the folder its name."""
        self._sweep()
        self.config["spqt"]["shards"] = {
            shard.name: files.sha256(self.folder / shard.name) for shard in self.shards
        }
        shards.write_index(self.folder, self.shards)
        with files.disk_errors(self.folder):
            config_json.write_config(self.folder, self.config)
        tokenizer_files.write(self.checkpoint, self.folder)
        files.write_text(self.folder / card.NAME, card.text(self.config, self.checkpoint, self.plan))
        files.publish(self.folder, self.output)
        with files.disk_errors(self.work):
            shutil.rmtree(self.work)


def _config(checkpoint: source.Checkpoint, planned: Plan) -> dict[str, Any]:
    """config.json of the output, complete but for the hashes."""
    quantization = ("quantization", "quantization_config", "compression_config")
    dropped = ("_name_or_path", *quantization, *config_json.CODE_KEYS)
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    if not planned.keep_vision_config:  # as mlx-lm's own save does
        config.pop("vision_config", None)
    if planned.dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = planned.dtype
    config["quantization"] = planned.quantization
    config["spqt"] = {
        "format_version": contract.format_version(config),
        "fingerprint": contract.settings_fingerprint(config),
        "source": checkpoint.identity(),
        "versions": {"spqt": __version__, "mlx": version("mlx")},
        **(checkpoint.exact or {}),
    }
    return config
