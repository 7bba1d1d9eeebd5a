"""Where weights come from: a model folder, a hub id, an MLX-quantized folder or a .gguf file.

`open_source` gives a checked `Checkpoint`, whose tensors are read one at a time. It decides whether
a source may be converted at all (architecture, custom code, quantization) before any weight is read,
and knows nothing of layouts or outputs.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from spqt_cli.convert.unpack import methods
from spqt_cli.convert.unpack.packed import Packed, Source
from spqt_cli.decode import architecture
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError, UsageError
from spqt_cli.format import checkpoint_files, locate
from spqt_cli.format.checkpoint_files import Tensor
from spqt_cli.format.config_json import CODE_KEYS, KEPT, TOKENIZER, read_config
from spqt_cli.system import files

DTYPES = {
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "BOOL": mx.bool_,
    "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
}  # fmt: skip
READ_AT_ONCE = 1 << 22  # elements of a .gguf tensor that are cast together


@dataclass
class Trust:
    """What the person allowed in this run."""

    remote_code: bool = False  # go on although the model brings code; the code itself never runs
    requantize: bool = False
    repack_experts: bool = False  # round experts in 4-bit floats once more, so that they can be skipped


@dataclass
class Checkpoint:
    """A checked source of weights.

    tensors: name -> Tensor, from headers. folder: where its small files lie. gguf: the open .gguf
    file, or None. quantization: what its config says of how it is quantized, empty for most. packed: weights
    that several tensors stand for; useless: tensors that no weight needs. warnings: lines for the person.
    exact: what the converted model's `spqt` section is to say for `exact`; None until the config is settled.
    repacks_experts: experts in 4-bit floats are widened, as all else is.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    repo: str | None = None
    revision: str | None = None
    gguf: Any = None
    quantization: dict[str, Any] = field(default_factory=dict)
    packed: list[Packed] = field(default_factory=list)
    useless: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    exact: dict[str, Any] | None = None
    repacks_experts: bool = False
    keep: object = None  # what must live as long as the folder is used
    _stamps: dict[Path, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stamps = {path: _stamp(path) for path in self.files()}

    def files(self) -> list[Path]:
        """The files that hold the weights."""
        if self.gguf is not None:
            return list(self.gguf.files())
        return [self.folder / name for name in sorted({t.shard for t in self.tensors.values()})]

    def weights(self) -> dict[str, mx.array]:
        """Every tensor by name, packed weights as plain numbers; lazy, so that nothing is read yet.

        Those of a .gguf file are stand-ins of the right shape and dtype: `read` has the values.
        """
        if self.gguf is not None:
            return {name: mx.zeros(t.shape, DTYPES[t.dtype]) for name, t in self.tensors.items()}
        lazy: dict[str, mx.array] = {}
        for path in self.files():
            lazy |= cast("dict[str, mx.array]", mx.load(str(path)))
        used = self.useless.union(*(one.stored for one in self.packed))
        plain = {name: lazy[name] for name in self.tensors if name not in used}
        return plain | {one.name: one.read(lazy) for one in self.packed}

    def read(self, name: str) -> mx.array:
        """One tensor of a .gguf file; cast in pieces, since NumPy has bfloat16 only as float32."""
        values, dtype = self.gguf.read(name), DTYPES[self.tensors[name].dtype]
        rows = max(1, READ_AT_ONCE // max(1, values[:1].size))
        pieces = []
        for start in range(0, len(values), rows):
            pieces.append(mx.array(values[start : start + rows]).astype(dtype))
            mx.eval(pieces[-1])
        del values
        return mx.concatenate(pieces)

    def check_unchanged(self) -> None:
        """Stop when a file of weights is no longer the one that was checked."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise SpqtError(f"{path} changed while it was being read", "run again when it is complete")

    def identity(self) -> dict[str, Any]:
        """What the converted model says about its source; the same on every machine."""
        declared = sorted((name, t.dtype, t.shape, t.shard) for name, t in self.tensors.items())
        headers = hashlib.sha256(json.dumps(declared).encode()).hexdigest()
        return {"name": self.repo or self.name, "revision": self.revision, "headers": headers}

    def stamps(self) -> list[tuple[str, tuple[int, int, int]]]:
        """The files of weights with size and times: enough to tell whether a resumed run reads the same."""
        return [(path.name, stamp) for path, stamp in sorted(self._stamps.items())]

    def kept_files(self) -> list[Path]:
        """The tokenizer, templates and licences that go along; plain files of the model's own only."""
        if self.gguf is not None:
            return []
        found = {path for path in self.folder.iterdir() for pattern in KEPT if path.match(pattern)}
        found |= {
            path
            for path in checkpoint_files.listed(self.folder / checkpoint_files.NAMED_TEMPLATES)
            if path.match("*.jinja")
        }
        return sorted(path for path in found if path.is_file() and checkpoint_files.is_own(self.folder, path))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SpqtError(f"{path} can't be read: {error.strerror}", "check the path") from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def open_source(source: str, revision: str | None, trust: Trust, *, headers_only: bool = False) -> Checkpoint:
    """The checked checkpoint that `source` names: a folder, a .gguf file or a hub id.

    headers_only: of a hub id, fetch no weights; its tensors can then be planned but not read.
    """
    if not source:
        raise SpqtError("the source's name is empty", "give a model folder, a hub id or a .gguf file")
    path = files.expanded(source)
    if not files.is_utf8(path):
        raise SpqtError(f"{source!a} is not UTF-8", "rename it")
    if path.exists() or not locate.is_hub_id(source):
        if revision is not None:
            raise UsageError(f"--revision is for hub ids, and {source} is a path", "leave --revision out")
        return _open_path(path, trust)
    from spqt_cli.format import hub

    fetched = hub.fetch(source, revision, lambda config: check_config(config, source, trust), headers_only)
    checkpoint = open_folder(fetched.folder, trust)
    checkpoint.name, checkpoint.repo, checkpoint.revision = source.split("/")[1], source, fetched.revision
    checkpoint.keep = fetched.keep
    return checkpoint


def _open_path(path: Path, trust: Trust) -> Checkpoint:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        if is_folder:
            next(path.iterdir(), None)
    except OSError as error:
        raise SpqtError(f"{path} can't be read: {error.strerror}", "check its permissions") from None
    if is_folder:
        return open_folder(path, trust)
    if is_file and path.suffix.lower() == ".gguf":
        return _open_gguf(path, trust)
    if is_file or path.exists():
        raise SpqtError(f"{path} is no model", "give a model folder, a hub id or a .gguf file")
    hint = "give a model folder, a hub id (org/name) or a .gguf file"
    raise SpqtError(f"{path} is not found", hint + locate.elsewhere(str(path)) + files.near(path))


def open_folder(folder: Path, trust: Trust) -> Checkpoint:
    """The checked checkpoint of a model folder in the hub's form."""
    config = read_config(folder)
    checkpoint_files.refuse_pipes(folder)
    check_config(config, str(folder), trust)
    shards, unused = checkpoint_files.shard_names(folder)
    if not shards:
        checkpoint_files.refuse_no_weights(folder)
    absent: list[str] = []
    tensors = checkpoint_files.read_headers(folder, shards, absent, checkpoint_files.EIGHT_BITS).tensors
    if {**config, **text_config(config)}.get("tie_word_embeddings") is False:
        checkpoint_files.refuse_lost_head(folder, absent)
    _check_tokenizer(folder, trust)
    settings = methods.settings(config) or methods.beside(folder)
    _check_quantization(settings, str(folder), trust)
    read_value, dtype = methods.read_value(folder, tensors), methods.dtype_of(config)
    stored = Source(str(folder), settings, tensors, read_value, dtype)
    packed, useless = methods.find(stored, config["model_type"])
    name = folder.resolve().name or "model"
    checkpoint = Checkpoint(
        name, folder, config, tensors, quantization=settings, packed=packed, useless=useless,
        repacks_experts=trust.repack_experts,
    )  # fmt: skip
    if unused:
        checkpoint.warnings.append(
            f"ignored, since the index does not name them: {checkpoint_files.named(unused)}"
        )
    if absent:
        checkpoint.warnings.append(
            f"the index names what no shard has, unused here: {checkpoint_files.named(absent)}"
        )
    if packed and (not settings or methods.is_native(settings)):
        checkpoint.warnings.append(
            "its weights have 8 bits and are rounded once more; most lose little by it"
        )
    return checkpoint


def _open_gguf(path: Path, trust: Trust) -> Checkpoint:
    from spqt_cli.convert.gguf.checkpoint import open_checkpoint
    from spqt_cli.convert.gguf.split import whole_name

    opened = open_checkpoint(path)
    check_config(opened.config, str(path), trust)
    dtype = _gguf_dtype(opened)
    tensors = {
        name: Tensor(dtype, tuple(opened.shape(name)), opened.file_of(name)) for name in opened.names()
    }
    return Checkpoint(whole_name(path), path.parent, opened.config, tensors, gguf=opened)


def _gguf_dtype(opened: Any) -> str:
    dtype = str(opened.dtype).rsplit(".", maxsplit=1)[-1]
    return {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[dtype]


def check_config(config: dict[str, Any], where: str, trust: Trust) -> None:
    """Refuse what spqt can't convert, from config.json alone."""
    if isinstance(config.get("spqt"), dict):
        raise UnsupportedError(f"{where} is already a converted model", "convert its source instead")
    if not trust.remote_code and (found := [key for key in CODE_KEYS if config.get(key)]):
        raise UnsupportedError(
            f"{where} brings its own code ({', '.join(found)} in config.json)",
            "spqt never runs it; --trust-remote-code goes on with mlx-lm's own classes",
        )
    architecture.classes(config, where)
    _check_quantization(methods.settings(config), where, trust)


def _check_quantization(settings: dict[str, Any], where: str, trust: Trust) -> None:
    methods.check(settings, where)
    if settings and not methods.is_native(settings) and not trust.requantize:
        raise UnsupportedError(
            f"{where} is already quantized", "convert the original, or accept the loss: --allow-requantize"
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal model's config that describes its language model; empty for others."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def _check_tokenizer(folder: Path, trust: Trust) -> None:
    """Refuse a missing or damaged tokenizer before any work."""
    if not any(path.match(pattern) for path in folder.iterdir() for pattern in TOKENIZER):
        raise SpqtError(f"{folder} has no tokenizer", "download its tokenizer files too")
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise SpqtError(f"{folder / 'tokenizer.json'} can't be read: {error}", AGAIN) from None
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and checkpoint_files.read_json(settings).get("auto_map") and not trust.remote_code:
        raise UnsupportedError(
            f"{settings} brings its own code (auto_map)",
            "spqt never runs it; --trust-remote-code goes on without it",
        )
