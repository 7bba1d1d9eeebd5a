"""A conversion appears whole or not at all, and goes on where it stopped."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from spqt_cli.convert import convert
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.errors import BusyError, ResourceError, SpqtError
from spqt_cli.format.folder import Folder
from spqt_cli.system import files
from tests.conftest import tiny_checkpoint
from tests.lib.converting import OPTIONS, contents, interrupted, leftovers, run


@pytest.mark.parametrize("after", [1, 9, 19])
def test_fault_53_resume_is_byte_equal(tmp_path: Path, checkpoint: Path, after: int) -> None:
    whole = run(checkpoint, tmp_path / "whole")
    output = tmp_path / "out"
    interrupted(checkpoint, output, after)
    assert not output.exists()
    result = convert.convert(str(checkpoint), output, OPTIONS)
    assert result.resumed == after
    assert contents(output) == whole
    assert leftovers(tmp_path) == []


def test_fault_53_data_lost_by_a_power_cut_is_written_again(tmp_path: Path, checkpoint: Path) -> None:
    whole = run(checkpoint, tmp_path / "whole")
    output = tmp_path / "out"
    interrupted(checkpoint, output, 9)
    shard = files.work_folders(output)[0] / "model" / "model.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(b"\0" * size)
    assert convert.convert(str(checkpoint), output, OPTIONS).resumed == 0
    assert contents(output) == whole


def test_other_options_do_not_resume(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    interrupted(checkpoint, output, 9)
    other = ConvertOptions(bits=8, group_size=32)
    result = convert.convert(str(checkpoint), output, other)
    assert result.resumed == 0
    assert any("left from another conversion" in warning for warning in result.warnings)
    shutil.rmtree(output)
    assert convert.convert(str(checkpoint), output, OPTIONS).resumed == 9


def test_changed_source_does_not_resume(tmp_path: Path) -> None:
    source, output = tiny_checkpoint(tmp_path / "m"), tmp_path / "out"
    interrupted(source, output, 9)
    tiny_checkpoint(source, seed=1)
    assert convert.convert(str(source), output, OPTIONS).resumed == 0
    assert contents(output) == run(source, tmp_path / "whole")


CONVERT = """
import os, signal, sys
from pathlib import Path
from spqt_cli.convert import convert
def tick(done, total, name):
    print(name, flush=True)
convert.convert(sys.argv[1], Path(sys.argv[2]), convert.ConvertOptions(group_size=32), tick)
print("done", flush=True)
"""


@pytest.mark.parametrize("lines", [1, 14, 20])
def test_fault_53_sigkill(tmp_path: Path, checkpoint: Path, lines: int) -> None:
    whole = run(checkpoint, tmp_path / "whole")
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, checkpoint, output], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() or contents(output) == whole
    if not output.exists():
        convert.convert(str(checkpoint), output, OPTIONS)
    assert contents(output) == whole


# Says so after four units and stays amid the fifth until a signal comes.
UNTIL_A_SIGNAL = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from spqt_cli.cli.main import main
from spqt_cli.convert import job
write, written = job.Conversion._write_unit, []
def stop_at_the_fifth(*args):
    while len(written) == 4:
        print("four units", flush=True)
        time.sleep(1000)
    written.append(1)
    return write(*args)
job.Conversion._write_unit = stop_at_the_fifth
sys.argv = ["spqt", "convert", *sys.argv[1:], "--q-group-size", "32"]
main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fault_54_signals_keep_the_progress(tmp_path: Path, checkpoint: Path, sent: int, code: int) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", UNTIL_A_SIGNAL, checkpoint, "-o", output],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "four units" not in (line := process.stdout.readline()):
        assert line, "it ended before"
    process.send_signal(sent)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert not output.exists()
    assert convert.convert(str(checkpoint), output, OPTIONS).resumed == 4
    assert leftovers(tmp_path) == []


def test_fault_16_shard_changes_while_it_is_read(tmp_path: Path) -> None:
    source, output = tiny_checkpoint(tmp_path / "m"), tmp_path / "out"
    shard = source / "model.safetensors"

    def spoil(done: float, total: float, name: str) -> None:
        os.truncate(shard, 5000)

    with pytest.raises(SpqtError, match="changed while"):
        convert.convert(str(source), output, OPTIONS, spoil)
    assert not output.exists()


def test_fault_16_shard_is_replaced(tmp_path: Path) -> None:
    source, output = tiny_checkpoint(tmp_path / "m"), tmp_path / "out"
    shard = source / "model.safetensors"

    def replace(done: float, total: float, name: str) -> None:
        (source / "new").write_bytes(shard.read_bytes())
        (source / "new").replace(shard)

    with pytest.raises(SpqtError, match="changed while"):
        convert.convert(str(source), output, OPTIONS, replace)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_fault_55_every_write_may_fail(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    whole = run(checkpoint, tmp_path / "whole")
    output = tmp_path / "out"
    pwrite, count = os.pwrite, 0

    def failing(file: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count % 7 == 0:
            raise OSError(code, os.strerror(code))
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    failures = 0
    while True:
        try:
            convert.convert(str(checkpoint), output, OPTIONS)
            break
        except ResourceError:
            failures += 1
            assert not output.exists()
    assert failures > 5  # and each run went on where the last one stopped
    assert contents(output) == whole


@pytest.mark.parametrize("name", ["write_text", "copy", "sync", "sha256"])
def test_fault_55_last_steps_may_fail(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    output = tmp_path / "out"

    def full(*args: Any) -> None:
        with files.disk_errors(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, name, full)
        with pytest.raises(ResourceError):
            convert.convert(str(checkpoint), output, OPTIONS)
        assert not output.exists()
    assert run(checkpoint, output) == run(checkpoint, tmp_path / "whole")


def test_fault_55_too_little_space(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="GB free"):
        run(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fault_56_read_only_target(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_only = tmp_path / "ro"
    read_only.mkdir()
    opened = os.open

    def refusing(path: Any, flags: int, *args: Any, **kw: Any) -> int:
        if str(path).startswith(str(read_only)) and flags & os.O_CREAT:  # root may write anywhere, so pretend
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *args, **kw)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(convert.source, "open_source", lambda *args, **kw: pytest.fail("work began"))
    with pytest.raises(ResourceError, match="can't be written"):
        run(checkpoint, read_only / "out")


def test_fault_57_two_converts_on_one_target(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"

    def second(done: float, total: float, name: str) -> None:
        with pytest.raises(BusyError, match="another run"):
            convert.convert(str(checkpoint), output, OPTIONS)

    convert.convert(str(checkpoint), output, OPTIONS, second)
    assert Folder(output).verify()


def test_fault_59_output_exists(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(BusyError):
        run(checkpoint, output)
    with pytest.raises(BusyError, match="source itself"):
        run(checkpoint, checkpoint)
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_fault_59_output_appears_during_the_run(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"

    def intrude(done: float, total: float, name: str) -> None:
        output.mkdir(exist_ok=True)
        (output / "precious").touch()

    with pytest.raises(BusyError):
        convert.convert(str(checkpoint), output, OPTIONS, intrude)
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_fault_61_too_little_memory(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    with pytest.raises(ResourceError, match="memory are free") as caught:
        run(checkpoint, tmp_path / "out")
    assert "--force" in caught.value.hint
    run(checkpoint, tmp_path / "out", ConvertOptions(group_size=32, force=True))
