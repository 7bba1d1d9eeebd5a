"""Folders that appear whole or not at all: targets, locks, space, errors of the disk."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spqt_cli.convert.journal import Journal
from spqt_cli.errors import BusyError, ResourceError
from spqt_cli.system import files

HOLD = """
import sys, time
from pathlib import Path
from spqt_cli.system import files
with files.claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(output: Path) -> "subprocess.Popen[str]":
    """A process that holds the lock of `output`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_fault_57_second_run_is_refused_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = holder(output)
    try:
        with pytest.raises(BusyError, match="another run"), files.claim(output):
            pass
        with files.claim(tmp_path / "other"):  # another target is free
            pass
    finally:
        process.kill()
        process.wait()


def test_fault_58_lock_of_a_dead_owner_is_taken_over(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = holder(output)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with files.claim(output):
        pass
    assert list(tmp_path.iterdir()) == []  # and leaves no lock file behind


def test_lock_within_one_process(tmp_path: Path) -> None:
    with files.claim(tmp_path / "out"), pytest.raises(BusyError), files.claim(tmp_path / "out"):
        pass


def test_fault_59_targets(tmp_path: Path) -> None:
    full, file, link, empty = (tmp_path / name for name in ("full", "file", "link", "empty"))
    full.mkdir()
    (full / "x").touch()
    file.touch()
    empty.mkdir()
    link.symlink_to(empty)
    for path, word in ((full, "not empty"), (file, "no folder"), (link, "symbolic link")):
        with pytest.raises(BusyError, match=word):
            files.check_target(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BusyError, match="symbolic link"):
        files.check_target(tmp_path / "dangling")
    files.check_target(empty)
    files.check_target(tmp_path / "new")


def test_fault_59_target_is_the_source(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "x").mkdir()
    with pytest.raises(BusyError, match="source itself"):
        files.check_target(tmp_path / "x" / ".." / "model", source)


def test_target_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="can't name"):
        files.check_target(tmp_path / ("é" * 120))


def test_publish_never_replaces(tmp_path: Path) -> None:
    folder, output = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    (folder / "new").touch()
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(BusyError):
        files.publish(folder, output)
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_publish_onto_an_empty_folder(tmp_path: Path) -> None:
    folder, output = tmp_path / "folder", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_text("x")
    output.mkdir()
    files.publish(folder, output)
    assert (output / "sub" / "x").read_text() == "x"
    assert not folder.exists()


def test_publish_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    (folder / "a").touch()
    steps: list[str] = []
    rename = os.rename
    monkeypatch.setattr(files, "sync", lambda path: steps.append(path.name))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), rename(a, b)))
    files.publish(folder, output)
    assert steps == ["a", "folder", "rename", tmp_path.name]


def test_fullfsync_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    calls: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, command: calls.append(command))
    files.sync(tmp_path)
    assert calls == [51]


def test_fullfsync_that_the_disk_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refusing(handle: int, command: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    calls: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refusing)
    monkeypatch.setattr(os, "fsync", calls.append)
    files.sync(tmp_path)
    assert len(calls) == 1


def test_sync_errors_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ResourceError):
        files.sync(tmp_path)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    path = tmp_path / "x"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    files.write_at(handle, 2, memoryview(b"0123456789"), path)
    os.close(handle)
    assert path.read_bytes() == b"\0\x000123456789"


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EROFS, "can't"),
        (errno.EIO, "failed"),
        (errno.EEXIST, "no folder"),
        (errno.ENOTDIR, "no folder"),
    ],
)
def test_errors_of_the_disk(tmp_path: Path, code: int, word: str) -> None:
    with pytest.raises(ResourceError, match=word), files.disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))


def test_fault_55_space_is_checked_before(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    files.check_space(tmp_path, 0)
    with pytest.raises(ResourceError, match="are needed"):
        files.check_space(tmp_path, free * 2 + 1)


def test_journal_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    first = Journal(tmp_path, "job")
    first.note("a", [1])
    first.note("b", [2])
    with first.path.open("a") as file:
        file.write('{"key": "c", "val')
    again = Journal(tmp_path, "job")
    assert again.done == {"a": [1], "b": [2]}
    again.note("c", [3])
    assert Journal(tmp_path, "job").done == {"a": [1], "b": [2], "c": [3]}


def test_journal_of_another_job_is_not_used(tmp_path: Path) -> None:
    Journal(tmp_path, "job").note("a", 1)
    assert not Journal.belongs(tmp_path, "another")
    assert Journal.belongs(tmp_path, "job")
    assert Journal(tmp_path, "another").done == {}


def test_names_near_one_that_is_not_there(tmp_path: Path) -> None:
    for name in ("my-model", "my-modem", "other"):
        (tmp_path / name).mkdir()
    near = files.near(tmp_path / "my-modle")
    assert str(tmp_path / "my-model") in near
    assert "other" not in near
    assert files.near(tmp_path / "my-model") == ""  # it is there
    assert files.near(tmp_path / "zzz") == ""
    assert str(tmp_path / "other") in files.near(tmp_path / "othr" / "deep" / "file.txt")
