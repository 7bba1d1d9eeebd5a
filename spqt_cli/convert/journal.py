"""A journal of finished pieces of work, so that an interrupted run goes on where it stopped.

One line of JSON per piece, the first line names the job. A line torn by a crash is dropped. The
journal proves nothing about the data: whoever resumes checks the hashes in it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from spqt_cli.system import files

NAME = "journal.jsonl"


def job_id(job: dict[str, Any]) -> str:
    """A name for what is to be done; runs with the same name may take over each other's work."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """The journal in a work folder. done: key of a finished piece -> what was noted with it."""

    def __init__(self, folder: Path, job: str) -> None:
        self.path = folder / NAME
        self.done: dict[str, Any] = {}
        if self.belongs(folder, job):
            lines = _lines(self.path)[1:]
            self.done = {line["key"]: line["value"] for line in lines if "key" in line}
        # Written anew, so that the torn end of a crashed run does not swallow the next line.
        text = json.dumps({"job": job}) + "\n" + "".join(_line(k, v) for k, v in self.done.items())
        files.write_text(self.path, text)

    @staticmethod
    def belongs(folder: Path, job: str) -> bool:
        """True if `folder` holds the beginnings of this very job."""
        lines = _lines(folder / NAME)
        return bool(lines) and lines[0].get("job") == job

    def note(self, key: str, value: Any) -> None:
        """Add a finished piece."""
        with files.disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(key, value))
        self.done[key] = value

    def forget(self, key: str) -> None:
        """Do a piece again in this run."""
        del self.done[key]

    def remove(self) -> None:
        """Delete the journal when the work is published."""
        with files.disk_errors(self.path):
            os.unlink(self.path)


def _line(key: str, value: Any) -> str:
    return json.dumps({"key": key, "value": value}) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        lines.append(value)
    return lines
