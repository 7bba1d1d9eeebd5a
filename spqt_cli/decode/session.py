"""Opens a model to decode with: generate, compare, calibrate, bench and `spqt_cli.load` all come here.

It knows folders, thresholds, this device's profile and draft models; it does not know prompts or the command
line. mlx-lm loads the weights.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import select
from spqt_cli.decode import (
    active_counts,
    adapter_folder,
    architecture,
    bytes_read,
    hooks,
    kernel_check,
    parallel,
    profile,
    quality_warning,
)
from spqt_cli.decode.hooks import as_stored, wished_sparsity
from spqt_cli.decode.layers import linear_layers, zigzag_layers
from spqt_cli.decode.options import Loading
from spqt_cli.errors import CONVERT_AGAIN, ResourceError, SpqtError, Terminated, UnsupportedError
from spqt_cli.format import config_json, locate, thresholds
from spqt_cli.format.folder import Folder, is_converted
from spqt_cli.system import files

DRAFT_NOTE = "proposed tokens are checked several at a time, which skips channels but reads all weights"


@dataclass
class Draft:
    """A model that proposes tokens to a larger one: converted, or any that mlx-lm loads."""

    model: nn.Module
    config: dict[str, Any]


@dataclass
class Loaded:
    """A model ready to run.

    folder: where it lies and what config.json says, checked. sparsity: what its
    thresholds aim at, 0 to 1; None when it runs dense. note: one line for a user where the model does
    not simply run as it was calibrated, else "". draft: proposes tokens, if there is one. processes: those
    that run it together, each with its part, if they are several.
    """

    model: nn.Module
    tokenizer: Any
    folder: Folder
    sparsity: float | None = None
    note: str = ""
    draft: Draft | None = None
    processes: parallel.Processes | None = None

    @property
    def config(self) -> dict[str, Any]:
        """config.json as read."""
        return self.folder.config

    @property
    def warning(self) -> str:
        """One line where the calibration measured that the text will suffer at this sparsity, else ""."""
        return quality_warning.warning_of(self.folder.calibration, self.sparsity)

    def add_note(self, text: str) -> None:
        """Append to `note`; "" adds nothing."""
        self.note = "; ".join(filter(None, [self.note, text]))


def load(path: str | Path | Folder, **options: Unpack[Loading]) -> Loaded:
    """A converted model with its tokenizer, ready to run as `options` say (`Loading` has their meaning).

    path: a folder, a hub id, or a folder that is checked already. The steps: check the folder, load it,
    set the thresholds, let each layer run as this device's profile says, load the draft model.
    Raises UsageError for a sparsity out of range, SpqtError when the folder is damaged, was edited, or is
    not a converted model.
    """
    sparsity, dense = options.get("sparsity"), options.get("dense", False)
    adapter, trusted = options.get("adapter_path"), options.get("trust_remote_code", False)
    thresholds.check_sparsity(sparsity)
    if (pipeline := options.get("pipeline")) is not None and (together := parallel.join(pipeline=pipeline)):
        return _load_part(path, options, together)
    if isinstance(path, Folder):
        folder = path
    else:
        folder = locate.open_folder(str(path), options.get("revision"), trust_remote_code=trusted)
    if adapter is not None:
        adapter_folder.check(files.expanded(adapter))
    loaded = Loaded(*_through_mlx_lm(folder, {"trust_remote_code": trusted}), folder)
    if adapter is not None:
        adapter_folder.put_on(loaded.model, adapter)
    _set_thresholds(loaded, wished_sparsity() if sparsity is None else sparsity, dense)
    if not dense:
        loaded.add_note(apply_profile(loaded))
        loaded.add_note(_read_whole(loaded))
    with _load_errors(folder.path):
        kernel_check.check(loaded.model)
    if draft := options.get("draft_model"):
        loaded.draft = load_draft(draft, loaded, dense=dense)
        if loaded.sparsity:
            loaded.add_note(DRAFT_NOTE)
    return loaded


def _load_part(path: str | Path | Folder, options: Loading, processes: parallel.Processes) -> Loaded:
    """As `load`, of this process's part. This device's profile is of whole layers and is not followed."""
    trusted, sparsity = options.get("trust_remote_code", False), options.get("sparsity")
    with processes.together():
        _refuse_more(options)
        sparsity = wished_sparsity() if sparsity is None else sparsity
        folder = path
        if not isinstance(folder, Folder):
            folder = locate.open_folder(str(path), options.get("revision"), trust_remote_code=trusted)
        architecture.classes(folder.config, str(folder))
    with processes.together():
        wishes = {"trust_remote_code": trusted, "processes": processes}
        loaded = Loaded(*_through_mlx_lm(folder, wishes), folder, processes=processes)
        _set_thresholds(loaded, sparsity, options.get("dense", False))
    if loaded.sparsity:
        loaded.add_note(_read_whole(loaded))
    return loaded


def _refuse_more(options: Loading) -> None:
    for name in ("adapter_path", "draft_model"):
        if options.get(name) is not None:
            raise UnsupportedError(
                f"--{name.replace('_', '-')}: mlx-lm runs neither adapters nor drafts in several processes",
                "leave it out, or start one process",
            )


def apply_profile(loaded: Loaded) -> str:
    """Let each layer run as this device's profile says; returns what `profile.follow` says."""
    return profile.follow(loaded.model, loaded.folder.curves, loaded.sparsity)


def _read_whole(loaded: Loaded) -> str:
    """A line where experts have thresholds that this backend only masks by; else ""."""
    backend, layers = select.backend(), zigzag_layers(loaded.model)
    plain = linear_layers(loaded.model)
    experts = [one for path, one in layers.items() if path not in plain]
    if backend.skips_experts or all(one.threshold is None for one in experts):
        return ""
    return f"backend {backend.name} reads experts whole: it has no kernel that skips in them"


def load_lazily(folder: Folder) -> Loaded:
    """As `load` with `dense`, but each weight stays on disk until it is first used."""
    loaded = Loaded(*_through_mlx_lm(folder, {"lazy": True}), folder)
    _set_thresholds(loaded, None, dense=True)
    return loaded


def _through_mlx_lm(folder: Folder, wishes: dict[str, Any]) -> tuple[nn.Module, Any]:
    """mlx-lm's model and tokenizer of a checked folder."""
    import mlx_lm

    # A class that ends the process is met here.
    architecture.classes(folder.config, str(folder))
    hooks.install()
    wishes = {**wishes, "tokenizer_config": {"trust_remote_code": wishes.get("trust_remote_code", False)}}
    processes = wishes.pop("processes", None)
    with plain_path(folder.path) as readable, _load_errors(folder.path), as_stored():
        if processes is not None:
            groups = (processes.group, None) if processes.pipeline else (None, processes.group)
            model, tokenizer = mlx_lm.utils.sharded_load(str(readable), *groups, **wishes)
        else:
            model, tokenizer, *_ = mlx_lm.load(str(readable), **wishes)
        tokenizer.encode("a")  # some values of tokenizer_config.json are read only then
        if not wishes.get("lazy"):
            _try_step(model)
    return model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder, as mlx-lm loads it; code that lies there is not run."""
    from mlx_lm import utils

    with _load_errors(folder):
        return utils.load_tokenizer(folder)


def _set_thresholds(loaded: Loaded, sparsity: float | None, dense: bool) -> None:
    calibration = loaded.folder.calibration
    if calibration is None:
        loaded.note = f"no thresholds yet, so nothing is skipped; run: spqt calibrate {loaded.folder}"
        if sparsity is not None and not dense:
            set_sparsity(loaded, sparsity)
    elif dense:
        set_dense(loaded)
    elif sparsity is None:
        loaded.sparsity = calibration.sparsity
    else:
        set_sparsity(loaded, sparsity)


def set_dense(loaded: Loaded) -> None:
    """Skip nothing, exact zeros included."""
    for layer in zigzag_layers(loaded.model).values():
        layer.set_threshold(None)
    loaded.note, loaded.sparsity = "", None


def set_sparsity(loaded: Loaded, sparsity: float) -> None:
    """Set the thresholds of another sparsity: the calibrated ones, or ones derived from the curves.

    sparsity: 0 to 0.95; at 0 only exact zeros are skipped, in layers that have them, which loses nothing.
    """
    chosen, calibration = loaded.folder.thresholds(sparsity), loaded.folder.calibration
    loaded.note = ""
    for path, layer in zigzag_layers(loaded.model).items():
        layer.set_threshold(chosen[path] or None)
    if sparsity and calibration and sparsity != calibration.sparsity:
        loaded.note = (
            f"thresholds for {sparsity:.0%} derived from the stored curves "
            f"(calibrated: {calibration.sparsity:.0%})"
        )
    loaded.sparsity = sparsity or None


def known(loaded: Loaded, tokens: list[int]) -> list[int]:
    """`tokens`, all of which the model has; others are refused before MLX sees them."""
    count = loaded.folder.size("vocab_size")
    if count is not None and tokens and not 0 <= min(tokens) <= max(tokens) < count:
        raise SpqtError(
            f"{loaded.folder}: its tokenizer gives token {max(tokens)}, the model has {count}",
            f"the tokenizer is of another model: {CONVERT_AGAIN}",
        )
    return tokens


def load_draft(name: str, target: Loaded, *, dense: bool = False) -> Draft:
    """A smaller model for speculative decoding: converted or any that mlx-lm loads.

    It skips what it is calibrated for, or what SPQT_SPARSITY says; nothing with `dense`.
    Raises SpqtError when its vocabulary is not the target's.
    """
    path, folder = files.expanded(name), None
    if not path.is_dir() or is_converted(path):
        folder = locate.open_folder(name)
        path = folder.path
    config = folder.config if folder else config_json.read_config(path)
    draft, tokenizer = load_stock(path, config)
    if tokenizer.vocab_size != target.tokenizer.vocab_size:
        raise SpqtError(
            f"{name} has {tokenizer.vocab_size} tokens, {target.folder} {target.tokenizer.vocab_size}",
            "a draft model needs the same tokenizer",
        )
    if folder:
        _set_thresholds(Loaded(draft, tokenizer, folder), wished_sparsity(), dense)
    return Draft(draft, config)


def load_stock(path: Path, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model and tokenizer of a folder as mlx-lm loads them; code that lies there is not run."""
    import mlx_lm

    architecture.classes(config, str(path))
    hooks.install()
    with plain_path(path) as readable, _load_errors(path):
        model, tokenizer, *_ = mlx_lm.load(str(readable))
    return model, tokenizer


@contextlib.contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    """Turn what mlx-lm and transformers raise over a damaged config or tokenizer into an SpqtError."""
    try:
        yield
    except (SpqtError, ImportError, MemoryError, Terminated):
        raise
    except SystemExit as end:
        raise UnsupportedError(
            f"{folder}: what loads it ends the process ({end.code})",
            "see what its architecture needs",
        ) from None
    except Exception as error:  # others' code over others' files: it may raise anything
        said = " ".join(str(error).split())[:200]
        if isinstance(error, RuntimeError) and "alloc" in said:
            raise ResourceError(f"{folder} does not fit in memory: {said}", "use a smaller model") from error
        raise SpqtError(
            f"{folder} can't be loaded: {type(error).__name__}: {said}",
            f"its config.json or tokenizer may be damaged: {CONVERT_AGAIN}",
        ) from error


def _try_step(model: nn.Module) -> None:
    """Build a step and never compute it: some values of config.json are read only when a model runs."""
    from mlx_lm.models.cache import make_prompt_cache

    model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path to `folder` without glob characters: mlx-lm finds its shards by an unescaped glob."""
    if not set("[]*?") & set(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "model"
        link.symlink_to(folder.resolve())
        yield link


def weight_bytes(model: nn.Module, config: dict[str, Any]) -> tuple[float, dict[int, float]]:
    """Bytes of weights that a dense decode step reads: of all other layers, and per Zigzag layer by id.

    Of a mixture of experts only the chosen experts count, of an embedding that is not also the head one row.
    """
    layers = {id(layer) for layer in zigzag_layers(model).values()}
    zigzag: dict[int, float] = {}
    other = 0.0
    modules = dict(model.named_modules())
    fractions = bytes_read.Fractions(modules, config)
    for path, module in modules.items():
        read = fractions.of(path)
        size = sum(value.nbytes for value in module.values() if hasattr(value, "nbytes"))
        packed = 0
        if id(module) in layers:
            packed = sum(module[name].nbytes for name in ("weight", "scales", "biases"))
            zigzag[id(module)] = packed * read
        other += (size - packed) * read
    return other, zigzag


def touched_bytes(loaded: Loaded | Draft, shares: list[active_counts.Share]) -> tuple[float, float, float]:
    """(bytes of weights read per step, bytes of a dense step, fraction of Zigzag weights skipped per token).

    The last may be more than is saved in reading: steps of several rows read what any of them needs.
    """
    other, zigzag = weight_bytes(loaded.model, loaded.config)
    by_layer = {id(share.layer): share for share in shares}
    dense = sum(zigzag.values())
    counted = [(size, by_layer[key]) for key, size in zigzag.items() if key in by_layer]
    unread = sum(size * (1 - share.read) for size, share in counted)
    skipped = sum(size * (1 - share.active) for size, share in counted)
    return other + dense - unread, other + dense, skipped / dense if dense else 0.0


def more_than_stored(loaded: Loaded, read: float) -> str:
    """A line where a dense step reads more bytes (`read`) than the model's files have; else ""."""
    stored = sum(tensor.nbytes for tensor in loaded.folder.tensors.values())
    if loaded.draft is not None or read <= stored:
        return ""
    return (
        f"dense MB a token exceed the {stored / 1e6:.1f} MB of the files: what is converted at load, as a "
        "tied head's scales are on a CPU, is read as float32"
    )
