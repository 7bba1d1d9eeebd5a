"""The tokenizer's files of a converted folder, right by themselves: loading them gives tokenizer.json.

transformers 5 picks a class by the model and by tokenizer_config.json; many classes build a tokenizer of
their own around the stored vocabulary. Where that differs, tokenizer_config.json is rewritten until what
is loaded is tokenizer.json, or the model is refused.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spqt_cli.convert import tokenizer_fidelity
from spqt_cli.convert.source import Checkpoint
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files, config_json
from spqt_cli.format.config_json import CODE_KEYS
from spqt_cli.system import files

SETTINGS = "tokenizer_config.json"
TOKENS = "added_tokens_decoder"  # the settings' own list of added tokens
SHOWN = 60  # characters of a line in a message


def rehearse(checkpoint: Checkpoint) -> None:
    """Refuse, before any work, a tokenizer that can't be kept; a warning where it needs other settings."""
    with files.disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = {key: value for key, value in checkpoint.config.items() if key not in CODE_KEYS}
        files.write_text(folder / config_json.CONFIG, json.dumps(config))
        if said := write(checkpoint, folder):
            checkpoint.warnings.append(said)


def write(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Write tokenizer, templates and licences into a folder that has its config.json.

    Returns a line for the person where tokenizer_config.json had to change. Raises UnsupportedError where
    no change helps, SpqtError where nothing loads.
    """
    for path in checkpoint.kept_files():
        target = folder / path.relative_to(checkpoint.folder)
        with files.disk_errors(target):
            target.parent.mkdir(exist_ok=True)
        files.copy(path, target)
    if checkpoint.gguf is not None:
        from spqt_cli.convert.gguf.checkpoint import write_tokenizer

        write_tokenizer(checkpoint.files()[0], folder)
    _drop_code(folder)
    if (folder / checkpoint_files.NAMED_TEMPLATES).is_dir():
        _unfold_templates(folder)
    return _keep(folder, checkpoint.name) if (folder / "tokenizer.json").is_file() else None


def _drop_code(folder: Path) -> None:
    """Take the names of custom code out of a copied tokenizer_config.json."""
    settings = _settings(folder)
    if settings.pop("auto_map", None):
        _write_settings(folder, settings)


def _unfold_templates(folder: Path) -> None:
    """Give the default template a file: beside named ones transformers overlooks that of the settings."""
    template, path = _settings(folder).get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, str) and files.is_utf8(template) and not path.exists():
        files.write_text(path, template)


def _keep(folder: Path, name: str) -> str | None:
    """See `write`."""
    from tokenizers import Tokenizer

    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded, first = _try(folder, truth)
    if first is None:
        return None
    last: str | SpqtError | None = first
    for settings in _changed(_settings(folder), loaded, truth):
        _write_settings(folder, settings)
        _, last = _try(folder, truth)
        if last is None:
            failing = "fails" if isinstance(first, SpqtError) else f"cuts {_short(first)} otherwise"
            return f"transformers' class for this tokenizer {failing}; {SETTINGS} now keeps tokenizer.json"
    if isinstance(last, SpqtError):
        raise last
    raise UnsupportedError(
        f"{name}: transformers makes another tokenizer of it than its tokenizer.json, "
        f"as the line {_short(last or '')} shows",
        "use a checkpoint with the tokenizer of its architecture",
    )


def _try(folder: Path, truth: Any) -> tuple[Any, str | SpqtError | None]:
    """The loaded tokenizer, and what is wrong: a line that differs, an error, or None for nothing."""
    try:
        tokenizer = _load(folder)
        if type(tokenizer._tokenizer).__module__.startswith("mlx_lm."):
            return tokenizer, None  # not a class by which transformers guesses: the model asks for it
        return tokenizer, tokenizer_fidelity.difference(tokenizer, _with_specials(tokenizer, truth))
    except SpqtError as error:
        return None, error


def _with_specials(tokenizer: Any, truth: Any) -> Any:
    """`truth`, and the added tokens that the loaded tokenizer has beside those of tokenizer.json.

    tokenizer_config.json names BOS, EOS and others, and transformers cuts a text that spells them as one
    token each, even where tokenizer.json has them in its vocabulary alone, or not at all. The model is
    published so. A token whose number tokenizer.json gives otherwise is none of these.
    """
    listed, known = truth.get_added_tokens_decoder(), truth.get_vocab(with_added_tokens=False)
    found = sorted(tokenizer.added_tokens_decoder.items())  # new ones get their numbers in this order
    more = [token for i, token in found if i not in listed and known.get(token.content, i) == i]
    if not more:
        return truth
    extended = type(truth).from_str(truth.to_str())
    extended.add_tokens(more)
    return extended


def _load(folder: Path) -> Any:
    """The tokenizer as mlx-lm loads it, without the warnings of the library below it."""
    from huggingface_hub.errors import StrictDataclassError
    from mlx_lm import utils
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return utils.load_tokenizer(folder)
    except (SpqtError, ImportError, MemoryError):
        raise
    except StrictDataclassError as error:  # transformers reads config.json on the way to the tokenizer
        said = " ".join(str(error).split()).partition("Error: ")[2].partition(" Errors: ")[0][:200]
        raise SpqtError(f"config.json: transformers refuses it: {said}", "mend or " + AGAIN) from error
    except Exception as error:  # others' code over others' files: it may raise anything
        said = " ".join(str(error).split())[:200]
        raise SpqtError(f"the tokenizer can't be loaded: {type(error).__name__}: {said}", AGAIN) from error
    finally:
        logging.set_verbosity(before)


def _changed(settings: dict[str, Any], loaded: Any, truth: Any) -> Iterator[dict[str, Any]]:
    """tokenizer_config.json, changed more and more until transformers can't but read tokenizer.json.

    loaded: the tokenizer of the class that is left, or None; special tokens that it brings are kept.
    """
    known = truth.get_vocab()
    for role in getattr(loaded, "SPECIAL_TOKENS_ATTRIBUTES", ()):
        token = getattr(loaded, role, None)
        if role not in settings and isinstance(token, str) and token in known:
            settings[role] = token
    settings["tokenizer_class"] = "TokenizersBackend"
    yield settings
    added = settings.get(TOKENS)
    if isinstance(added, dict):  # its flags take the place of those in tokenizer.json
        own = {str(i): _flags(token) for i, token in truth.get_added_tokens_decoder().items()}
        settings[TOKENS] = {i: own.get(i, token) for i, token in added.items()}
        yield settings
    # Of some architectures (qwen2, qwen3_5) transformers takes its class whatever is named here. It reads
    # tokenizer.json for them with this key alone, which lets no code run: none is named, and none lies here.
    settings["trust_remote_code"] = True
    yield settings


def _flags(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return checkpoint_files.read_json(path) if path.exists() else {}


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    files.write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _short(line: str) -> str:
    return repr(line if len(line) <= SHOWN else line[:SHOWN] + "...")
