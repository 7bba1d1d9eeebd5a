"""Progress of a calibration, kept in the model's folder until the thresholds are written.

A run with the same identity goes on where the last one stopped; another is refused. It knows nothing
of what the arrays mean.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.errors import BusyError
from spqt_cli.system import files

NAME = ".spqt-calibration.npz"
LEFT = (".spqt-progress-*", ".spqt-hidden-*")  # of a run that was killed while writing; hidden states


class Progress:
    """Named arrays saved under an identity: what model, text and settings they were made with."""

    def __init__(self, folder: Path, identity: dict[str, Any], restart: bool) -> None:
        self.folder, self.path = folder, folder / NAME
        text = json.dumps(identity, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()
        self.arrays: dict[str, np.ndarray] = {} if restart else self._load()

    def _load(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            return {}
        except Exception:  # numpy raises many kinds on a damaged archive; nothing in it is irreplaceable
            return {}
        if str(arrays.pop("key", "")) != self._key:
            raise BusyError(
                f"{self.folder} holds an unfinished calibration with another text, seed or settings",
                "repeat that command to finish it, or add --restart to drop it",
            )
        return arrays

    def save(self, **arrays: np.ndarray) -> None:
        """Add arrays and replace the file in one step."""
        self.arrays.update(arrays)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, key=np.array(self._key), **self.arrays)
        with files.disk_errors(self.folder):
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".spqt-progress-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(buffer.getvalue())
                os.replace(temporary, self.path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def clear(self) -> None:
        """The work is done, or there is nothing to finish: remove all files of it."""
        for left in (self.path, *(path for pattern in LEFT for path in self.folder.glob(pattern))):
            with contextlib.suppress(OSError):
                left.unlink()
