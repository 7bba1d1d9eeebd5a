"""Files that appear whole or not at all: locks, work folders, syncing, space.

It knows nothing of models. A folder is built in a work folder beside its target, under a lock, and
renamed last; errors of the disk become `ResourceError`.
"""

import contextlib
import difflib
import errno
import hashlib
import itertools
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from spqt_cli.errors import BusyError, ResourceError, SpqtError

FULL = {errno.ENOSPC, errno.EDQUOT}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
LONGEST_TEXT = 1 << 28  # bytes of a text to calibrate on, or of a prompt
MOST_NAMES = 10_000  # of a folder, looked through for one like another
LONGEST_NAME = 200  # bytes of a target's name; file systems allow 255 and ours add a prefix and suffix


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about writing to `path` into a ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(
                f"the disk of {path} is full", "free some space; the same command goes on where it stopped"
            ) from None
        if error.errno in DENIED:
            raise ResourceError(
                f"{path} can't be written: {error.strerror}", "check its permissions or choose another place"
            ) from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise ResourceError(f"{path} is no folder", "choose another -o") from None
        raise ResourceError(f"writing {path} failed: {error}", "check the disk, then run again") from None


def is_utf8(path: Path | str) -> bool:
    """False for a name that can't be passed to MLX, which takes UTF-8 alone."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def expanded(path: Path | str) -> Path:
    """A path with `~` resolved; that of a user who does not exist stays as it is."""
    return Path(os.path.expanduser(path))


def near(path: Path | str) -> str:
    """The end of a hint where something of a similar name lies beside a path that is not there; else ""."""
    found = near_paths(path)
    return f"; near it: {', '.join(map(str, found))}" if found else ""


def near_paths(path: Path | str) -> list[Path]:
    """What has a similar name and lies beside a path that is not there, the most similar first.

    Of a path whose folder is not there, what is like that folder.
    """
    missing = expanded(path)
    if missing.exists():
        return []
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        names = [one.name for one in itertools.islice(missing.parent.iterdir(), MOST_NAMES)]
    except OSError:
        return []
    return [missing.parent / name for name in difflib.get_close_matches(missing.name, names, 3)]


def read_bounded(path: Path, longest: int = LONGEST_TEXT) -> bytes:
    """The bytes of a file that a person named; see `drain`."""
    with path.open("rb") as file:
        return drain(file, str(path), longest)


def drain(file: BinaryIO, name: str, longest: int = LONGEST_TEXT) -> bytes:
    """What is left in an open file; SpqtError for more than `longest` bytes, since a device never ends."""
    data = file.read(longest + 1)
    if len(data) > longest:
        raise SpqtError(f"{name} is longer than {longest / 1e6:.0f} MB", "give a shorter text")
    return data


def check_target(output: Path, source: Path | None = None) -> None:
    """Refuse a target that holds anything, is a link or is the source; an empty folder will do."""
    if not is_utf8(output):
        raise ResourceError(f"{str(output)!a} is not UTF-8", "choose another -o")
    if not output.name or len(os.fsencode(output.name)) > LONGEST_NAME:
        raise ResourceError(f"{output} can't name a folder here", f"use at most {LONGEST_NAME} bytes")
    with disk_errors(output):
        is_link = output.is_symlink()
    if is_link:
        raise BusyError(f"{output} is a symbolic link", "name the folder itself, or another -o")
    if source is not None and output.exists() and source.exists() and output.samefile(source):
        raise BusyError(f"{output} is the source itself", "choose another -o")
    if output.is_dir():
        with disk_errors(output):
            empty = not any(output.iterdir())
        if not empty:
            raise BusyError(f"{output} exists and is not empty", "delete it or choose another -o")
    elif output.exists():
        raise BusyError(f"{output} exists and is no folder", "delete it or choose another -o")


@contextlib.contextmanager
def claim(output: Path) -> Iterator[None]:
    """Hold the right to write `output`; a second run is refused at once.

    The system drops the lock of a process that died. Its file is removed while the lock is held,
    which filelock's check of the link count makes safe.
    """
    with disk_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output.parent / f".{output.name}.spqt.lock", timeout=0)
    with disk_errors(output.parent):
        try:
            lock.acquire()
        except filelock.Timeout:
            if not Path(lock.lock_file).exists():  # /proc and its like take no files at all
                raise ResourceError(f"{output.parent} takes no files", "choose another -o") from None
            raise BusyError(f"another run is writing {output}", "wait for it to end") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def work_folders(output: Path) -> list[Path]:
    """The work folders that earlier runs for `output` left, in the order of their names."""
    prefix = _work_prefix(output)
    return sorted(path for path in output.parent.iterdir() if path.name.startswith(prefix) and path.is_dir())


def new_work_folder(output: Path) -> Path:
    """A new, empty folder beside `output`, on the same file system."""
    path = output.parent / f"{_work_prefix(output)}{secrets.token_hex(4)}"
    with disk_errors(path):
        path.mkdir()
    return path


def _work_prefix(output: Path) -> str:
    return f".{output.name}.spqt-work-"


def write_at(file: int, offset: int, data: memoryview, path: Path) -> None:
    """Write all of `data` (bytes) into an open file at `offset`."""
    with disk_errors(path):
        while data:
            written = os.pwrite(file, data, offset)
            offset += written
            data = data[written:]


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file; it is made durable by `publish`."""
    with disk_errors(path):
        path.write_text(text, encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Replace a small UTF-8 file in one step: a power cut leaves the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".spqt-text-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        sync(Path(temporary))
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def copy(source: Path, target: Path) -> None:
    """Copy a small file's bytes; owner, times and mode stay behind, so that runs are byte-equal."""
    try:
        reader = source.open("rb")
    except OSError as error:
        raise SpqtError(f"{source} can't be read: {error.strerror}", "check its permissions") from None
    with reader, disk_errors(target), target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)


def sync(path: Path) -> None:
    """Make a file or folder survive a power cut; on macOS fsync alone does not."""
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            _full_sync(handle)
        finally:
            os.close(handle)


def _full_sync(handle: int) -> None:
    """The strongest sync that the file system of an open file has."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # network and FAT disks have only fsync
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't sync a folder
            raise


def publish(folder: Path, output: Path) -> None:
    """Make `folder` durable and give it its final name, which must be free or an empty folder."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
    check_target(output)
    with disk_errors(output):
        os.rename(folder, output)
    sync(output.parent)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin when the disk of `folder` has less than `needed` bytes free."""
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed",
            "free some space or choose another -o",
        )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where spqt keeps what it can measure again."""
    home = Path("~/Library/Caches" if platform.system() == "Darwin" else "~/.cache").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "spqt"
