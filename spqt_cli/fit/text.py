"""The windows of text that weights are fitted on: the model's own, a file's, or both; kept for resumed runs.

They lie in one file beside the work folder: the tokens, and what they were made of. It knows no methods.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.errors import SpqtError
from spqt_cli.fit.starts import OPENINGS_EACH
from spqt_cli.measure import texts
from spqt_cli.system import files
from spqt_cli.version import __version__

NAME = "text.npz"
OnProgress = Callable[[float, float, str], None]
Write = Callable[[int, int, int, OnProgress], np.ndarray]


@dataclass(frozen=True)
class TextOptions:
    """own: windows that the model writes itself; data: a file of text, whose windows are added: as many as
    `most` allows, from its beginning. length: tokens of a window. seed, openings_each: of the model's own
    text, as in `own_text.Wishes`.
    """

    own: int = 64
    length: int = 512
    seed: int = 0
    data: Path | None = None
    most: int = 64
    openings_each: int = OPENINGS_EACH


@dataclass(frozen=True)
class FitText:
    """windows: (count, length), int32, own ones first. sha256: of their bytes, little-endian, row by row.

    own: how many of them the model wrote. notes: lines for the person.
    """

    windows: np.ndarray
    sha256: str
    own: int
    notes: tuple[str, ...] = ()


def prepare(
    folder: Path,
    source: dict[str, Any],
    options: TextOptions,
    tokenizer: Any,
    write: Write,
    on_progress: OnProgress,
) -> FitText:
    """The text to fit on, from `folder` if an earlier run left the same one there, else made and kept there.

    source: the identity of the model that writes (`Checkpoint.identity`). write: (count, length, seed,
    on_progress) -> windows, as `own_text.windows` gives them; only called where own
    text is needed, so that a model need not be loaded for text that is kept. Raises SpqtError for a
    file that is no text or too short, and for options that ask for no window at all.
    """
    given = None if options.data is None else texts.read(options.data)
    identity = _identity(source, options, given)
    kept, note = read(folder, identity)
    if kept is not None:
        return kept
    own = _own(options, write, on_progress)
    rows = [own] if given is None else [own, _windows_of(given, tokenizer, options)]
    windows = np.concatenate(rows).astype(np.int32)
    if not len(windows):
        raise SpqtError(
            "there is no text to fit on", "ask for windows of own text, or name a text: --data FILE"
        )
    found = FitText(windows, sha256(windows), len(own), (note,) if note else ())
    _keep(folder, identity, found)
    return found


def sha256(windows: np.ndarray) -> str:
    """The SHA-256 of windows' tokens, in hexadecimal: the same on every machine."""
    return hashlib.sha256(np.ascontiguousarray(windows, "<i4").tobytes()).hexdigest()


def read(folder: Path, identity: dict[str, Any]) -> tuple[FitText | None, str]:
    """(what `prepare` kept in a folder for this identity, a line where it is there and damaged)."""
    path = folder / NAME
    if not path.is_file():
        return None, ""
    try:
        with np.load(io.BytesIO(files.read_bounded(path)), allow_pickle=False) as stored:
            said = json.loads(str(stored["said"]))
            windows = stored["windows"]
        if said["identity"] != json.loads(json.dumps(identity)):
            return None, ""  # another model, seed or file: not damaged, but not ours
        if windows.ndim == 2 and windows.dtype == np.int32 and sha256(windows) == said["sha256"]:
            return FitText(windows, said["sha256"], int(said["own"])), ""
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, SpqtError):
        pass
    return None, f"{path} is damaged; its text was made anew"


def _identity(source: dict[str, Any], options: TextOptions, given: texts.Text | None) -> dict[str, Any]:
    """What text depends on: equal ones give equal tokens on one machine."""
    return {
        "source": source,
        "own": options.own,
        "length": options.length,
        "seed": options.seed,
        "openings_each": options.openings_each,
        "data": None if given is None else {"sha256": given.sha256, "most": options.most},
        "versions": {"spqt": __version__, **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")}},
    }


def _own(options: TextOptions, write: Write, on_progress: OnProgress) -> np.ndarray:
    if options.own <= 0:
        return np.zeros((0, options.length), np.int32)
    return write(options.own, options.length, options.seed, on_progress)


def _windows_of(given: texts.Text, tokenizer: Any, options: TextOptions) -> np.ndarray:
    """The first windows of a file's text, each begun as the tokenizer begins a text."""
    stream = texts.tokens(given, tokenizer)
    rows = texts.windows(stream, options.length, texts.opening(tokenizer))
    texts.need(rows, 1, given)
    return rows[: options.most]


def _keep(folder: Path, identity: dict[str, Any], found: FitText) -> None:
    """Write the file under another name, make it durable, and give it its own: whole or not at all."""
    path = folder / NAME
    partial = path.with_suffix(".partial")
    said = json.dumps({"identity": identity, "sha256": found.sha256, "own": found.own})
    with files.disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, windows=found.windows, said=np.array(said))
        files.sync(partial)
        os.replace(partial, path)
        files.sync(folder)
