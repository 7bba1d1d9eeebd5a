"""Loading a converted model: the folder is checked first, mlx-lm does the rest.

It knows folders and thresholds; it does not know prompts or the command line.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli import format, identity, source, thresholds
from spqt_cli.errors import ResourceError, SpqtError
from spqt_cli.patch import wished_sparsity, zigzag_layers


@dataclass
class Loaded:
    """A model ready to run.

    sparsity: the share of channels that its thresholds aim to skip, None when it runs dense.
    note: one line for people when that is not simply what the calibration says.
    """

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    folder: Path
    sparsity: float | None
    note: str = ""


def load(
    path: str | Path,
    *,
    sparsity: float | None = None,
    dense: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter_path: str | None = None,
) -> Loaded:
    """A converted model from a folder or hub id, with its tokenizer.

    sparsity: derive thresholds for this share from the stored curves instead of the calibrated ones;
    None takes SPQT_SPARSITY, where that is set. dense: skip nothing.
    Raises SpqtError when the folder is damaged, was edited, or is not a converted model.
    """
    folder = source.local_folder(str(path), revision=revision)
    config = identity.check_model(folder, trust_remote_code=trust_remote_code)
    if adapter_path is not None and not (Path(adapter_path) / "adapter_config.json").is_file():
        raise SpqtError(f"{adapter_path} has no adapter_config.json", "give a folder of LoRA adapters")
    wishes: dict[str, Any] = {"adapter_path": adapter_path, "trust_remote_code": trust_remote_code}
    model, tokenizer = _through_mlx_lm(folder, wishes)
    loaded = Loaded(model, tokenizer, config, folder, None)
    _set_thresholds(loaded, wished_sparsity() if sparsity is None else sparsity, dense)
    return loaded


def load_lazily(path: Path) -> Loaded:
    """As `load` with `dense`, but each weight stays on disk until it is first used."""
    config = identity.check_model(path)
    loaded = Loaded(*_through_mlx_lm(path, {"lazy": True}), config, path, None)
    _set_thresholds(loaded, None, dense=True)
    return loaded


def _through_mlx_lm(folder: Path, wishes: dict[str, Any]) -> tuple[nn.Module, Any]:
    """mlx-lm's model and tokenizer of a checked folder."""
    import mlx_lm

    with plain_path(folder) as readable, _load_errors(folder):
        model, tokenizer, *_ = mlx_lm.load(
            str(readable),
            tokenizer_config={"trust_remote_code": wishes.get("trust_remote_code", False)},
            **wishes,
        )
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
    calibration = loaded.config["spqt"].get("calibration")
    if calibration is None:
        loaded.note = f"no thresholds yet, so nothing is skipped; run: spqt calibrate {loaded.folder}"
        if sparsity is not None and not dense:
            set_sparsity(loaded, sparsity)
    elif dense:
        set_dense(loaded)
    elif sparsity is None:
        loaded.sparsity = calibration["sparsity"]
    else:
        set_sparsity(loaded, sparsity)


def set_dense(loaded: Loaded) -> None:
    """Skip nothing, exact zeros included."""
    for layer in zigzag_layers(loaded.model).values():
        layer.set_threshold(None)
    loaded.note, loaded.sparsity = "", None


def set_sparsity(loaded: Loaded, sparsity: float) -> None:
    """Skip another share of the channels: the calibrated thresholds, or ones derived from the curves.

    sparsity: 0 to 0.95; at 0 only exact zeros are skipped, in layers that have them, which loses nothing.
    """
    calibrated = calibrated_share(loaded.config, loaded.folder, sparsity)
    loaded.note = ""
    entries = format.entries(loaded.config)
    for path, layer in zigzag_layers(loaded.model).items():
        entry = entries[path]["spqt"]
        if sparsity == calibrated:
            threshold = entry["threshold"]
        else:
            threshold = thresholds.derive(entry.get("curve", []), sparsity)
        layer.set_threshold(threshold or None)
    if sparsity and sparsity != calibrated:
        loaded.note = (
            f"thresholds for {sparsity:.0%} derived from the stored curves (calibrated: {calibrated:.0%})"
        )
    loaded.sparsity = sparsity or None


def calibrated_share(config: dict[str, Any], folder: Path, sparsity: float) -> float | None:
    """The share that a model was calibrated for, None where it was not; SpqtError if `sparsity` needs it."""
    share: float | None = (config["spqt"].get("calibration") or {}).get("sparsity")
    if sparsity and share is None:
        raise SpqtError(
            f"{folder} has no thresholds to derive {sparsity:.0%} from",
            f"spqt calibrate {folder} --sparsity {sparsity}",
        )
    return share


def known(loaded: Loaded, tokens: list[int]) -> list[int]:
    """`tokens`, all of which the model has. MLX looks others up beyond the embedding and may crash."""
    count = format.whole(loaded.config, "vocab_size")
    if count is not None and tokens and not 0 <= min(tokens) <= max(tokens) < count:
        raise SpqtError(
            f"{loaded.folder}: its tokenizer gives token {max(tokens)}, the model has {count}",
            "the tokenizer is of another model: download or convert the model again",
        )
    return tokens


def load_draft(path: str, target: Loaded) -> nn.Module:
    """A smaller model for speculative decoding: converted or any that mlx-lm loads.

    Raises SpqtError when its vocabulary is not the target's.
    """
    import mlx_lm

    folder = source.local_folder(path)
    if "spqt" in format.read_config(folder):
        identity.check_model(folder)
    with plain_path(folder) as readable, _load_errors(folder):
        draft, tokenizer, *_ = mlx_lm.load(str(readable))
    if tokenizer.vocab_size != target.tokenizer.vocab_size:
        raise SpqtError(
            f"{path} has {tokenizer.vocab_size} tokens, {target.folder} {target.tokenizer.vocab_size}",
            "a draft model needs the same tokenizer",
        )
    return draft


@contextlib.contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    """Turn what mlx-lm and transformers raise over a damaged config or tokenizer into an SpqtError."""
    try:
        yield
    except (SpqtError, ImportError, MemoryError):
        raise
    except Exception as error:  # others' code over others' files: it may raise anything
        said = " ".join(str(error).split())[:200]
        if isinstance(error, RuntimeError) and "alloc" in said:
            raise ResourceError(f"{folder} does not fit in memory: {said}", "use a smaller model") from error
        raise SpqtError(
            f"{folder} can't be loaded: {type(error).__name__}: {said}",
            "its config.json or tokenizer may be damaged: download or convert the model again",
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


def weight_bytes(model: nn.Module, config: dict[str, Any]) -> tuple[float, dict[int, int]]:
    """Bytes of weights that a dense decode step reads: of all other layers, and per Zigzag layer by id.

    Of a mixture of experts only the chosen experts count; of an embedding that is not also the head,
    nothing (one row).
    """
    zigzag = {
        id(layer): sum(layer[name].nbytes for name in ("weight", "scales", "biases"))
        for layer in zigzag_layers(model).values()
    }
    other = 0.0
    tied = config.get("tie_word_embeddings", False) or not hasattr(model, "lm_head")
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and (not tied or "head" in module):
            continue  # one row is read; a head of its own (heads.py) comes as a module
        arrays = [value for value in module.values() if hasattr(value, "nbytes")]
        size = sum(array.nbytes for array in arrays)
        if id(module) in zigzag:
            size -= zigzag[id(module)]
        if "switch_mlp" in path or "experts" in path.split("."):
            size = int(size * _experts_share(config))
        other += size
    return other, zigzag


def _experts_share(config: dict[str, Any]) -> float:
    config = format.sizes(config)
    chosen = config.get("num_experts_per_tok") or config.get("top_k_experts")
    total = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)),
        None,
    )
    return chosen / total if chosen and total else 1.0


def touched_bytes(loaded: Loaded, densities: list[tuple[Any, float]]) -> tuple[float, float, float]:
    """(bytes of weights read per token, bytes of a dense step, share of Zigzag weights skipped)."""
    other, zigzag = weight_bytes(loaded.model, loaded.config)
    density = {id(layer): value for layer, value in densities}
    read = sum(size * density.get(key, 1.0) for key, size in zigzag.items())
    dense = sum(zigzag.values())
    return other + read, other + dense, 1 - read / dense if dense else 0.0
