"""Odd arguments: one clear line and the right exit code, never a traceback, never memory without end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from spqt_cli import __main__
from spqt_cli.cli import main, presets, worker
from spqt_cli.convert import source
from spqt_cli.errors import BusyError, ResourceError, SpqtError
from spqt_cli.measure import texts
from spqt_cli.system import files
from tests.cli.test_commands import assert_error, spqt
from tests.lib.converting import config_of

LONG = "x" * 300  # no file system takes a name of so many bytes
linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


def test_convert_of_nothing(tmp_path: Path) -> None:
    assert_error(spqt("convert", "", "-o", tmp_path / "out"), 3, "empty")


def test_source_of_a_user_who_does_not_exist(tmp_path: Path) -> None:
    assert_error(spqt("convert", "~nosuchuser/model", "-o", tmp_path / "out"), 3, "~nosuchuser")


@pytest.mark.parametrize("command", ["convert", "calibrate", "inspect", "verify"])
def test_fault_60_name_too_long_to_read(command: str) -> None:
    assert_error(spqt(command, LONG), 3, "too long")


def test_fault_60_name_too_long_to_write(checkpoint: Path, tmp_path: Path) -> None:
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / LONG), 5, "200 bytes")
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / LONG / "out"), 5, "too long")


@linux
@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_is_no_model(device: str, tmp_path: Path) -> None:
    with pytest.raises(SpqtError, match="is no model"):
        source.open_source(device, None, source.Trust())


@linux
def test_files_that_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one took all memory of the machine before."""
    monkeypatch.setattr(files.read_bounded, "__defaults__", (1 << 16,))
    with pytest.raises(SpqtError, match="longer than"):
        texts.read(Path("/dev/full"))
    with pytest.raises(SpqtError, match="longer than"):
        presets.load_preset("/dev/full")


def test_stdin_that_never_ends(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.drain, "__defaults__", (1000,))
    result = spqt("generate", "--model", converted, "-p", "-", stdin=b"fox " * 1000)
    assert_error(result, 3, "stdin is longer")


def test_fault_56_file_system_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc answers a new file with ENOENT, which the lock takes for a rival."""
    opened = os.open

    def refusing(path: str, flags: int, *args: int, **kw: int) -> int:
        if flags & os.O_CREAT:
            raise FileNotFoundError(2, "No such file or directory", path)
        return opened(path, flags, *args, **kw)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ResourceError, match="takes no files"), files.claim(tmp_path / "out"):
        pass


def test_fault_59_links_that_lead_in_a_circle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BusyError, match="symbolic link"):
        files.check_target(tmp_path / "a", checkpoint)
    assert_error(spqt("convert", tmp_path / "a", "-o", tmp_path / "out"), 3, "not found")
    assert_error(spqt("inspect", tmp_path / "a"), 3)


@pytest.mark.parametrize(
    "flags",
    [
        "--seed -1", "--seed 99999999999999999999999", "--temp nan", "--temp -1", "--temp inf", "--top-p 5",
        "--top-p nan", "--top-k -3", "--top-k 512", "--min-p 2", "--repetition-penalty -1",
        "--repetition-penalty nan", "--max-kv-size 0", "--prefill-step-size 0", "--prefill-step-size -5",
        "--kv-bits 7", "--kv-bits 4 --kv-group-size 13", "--kv-bits 4", "--quantized-kv-start -9",
        "--extra-eos-token nosuch", "--xtc-threshold -1", "--xtc-probability 7", "--min-tokens-to-keep -4",
        "--min-p 0.5 --min-tokens-to-keep 513",
    ],
)  # fmt: skip
def test_generate_values_out_of_range(converted: Path, flags: str) -> None:
    assert_error(spqt("generate", "--model", converted, "-p", "fox", "-m", 2, *flags.split()), 2, "--")


def test_generate_values_at_their_ends(calibrated: Path) -> None:
    flags = "--seed 0 --temp 0.7 --top-p 1 --top-k 511 --min-p 0 --repetition-penalty 1 --max-kv-size 64"
    result = spqt("generate", "--model", calibrated, "-p", "fox", "-m", 2, *flags.split())
    assert result.returncode == 0


def test_adapters_that_are_not_there(converted: Path, tmp_path: Path) -> None:
    result = spqt("generate", "--model", converted, "-p", "fox", "--adapter-path", tmp_path)
    assert_error(result, 3, "adapter_config.json", "LoRA")


@pytest.mark.parametrize("command", ["inspect", "verify", "calibrate"])
def test_a_file_is_no_model_folder(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_error(spqt(command, tmp_path / "file"), 3, "is no folder")


def test_output_inside_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / "file" / "out"), 5, "is no folder")


def test_calibrate_with_a_negative_seed(converted: Path) -> None:
    assert spqt("calibrate", converted, "--seed", "-1").returncode == 2


def test_fault_42_prompt_that_is_not_utf8(converted: Path) -> None:
    assert_error(spqt("generate", "--model", converted, "-p", os.fsdecode(b"\xff\xfe")), 3, "UTF-8")


def test_sparsity_without_thresholds(converted: Path) -> None:
    assert_error(spqt("generate", "--model", converted, "-p", "fox", "--sparsity", 0.3), 3, "calibrate")
    result = spqt("compare", "--model", converted, "-p", "fox", "-m", 2, "--quiet")
    assert_error(result, 3, "no thresholds")


@pytest.mark.parametrize("delay", ["nan", "-1", "inf"])
def test_bench_delay_that_is_no_time(calibrated: Path, delay: str) -> None:
    assert_error(spqt("bench", "--model", calibrated, "--delay", delay), 2, "--delay")


@pytest.mark.parametrize("flags", ["--depth 1.7", "--depth x", "-p 16,y", "--bits 3", "--dtype float16"])
def test_bench_flags_that_would_be_ignored(calibrated: Path, flags: str) -> None:
    assert_error(spqt("bench", "--model", calibrated, *flags.split()), 2, "--")


def test_bench_output_is_tried_before_the_work(calibrated: Path, tmp_path: Path) -> None:
    flags = ("-p", 0, "-g", 2, "-r", 2)
    assert_error(spqt("bench", "--model", calibrated, *flags, "-o", tmp_path / "no" / "x"), 5, "--output")


@linux
@pytest.mark.parametrize(
    "arguments", [["inspect"], ["inspect", "--json"], ["generate", "-p", "fox", "-m", "2"]]
)
def test_fault_55_full_disk_behind_stdout(arguments: list[str], calibrated: Path) -> None:
    command, *flags = arguments
    where = ["--model", calibrated] if command == "generate" else [calibrated]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spqt_cli", command, *where, *flags],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_fault_54_interrupt_while_the_command_line_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "spqt_cli.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "spqt_cli.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delattr("spqt_cli.cli.main")
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code == 130


def test_fault_68_names_in_errors_do_not_act_on_a_terminal(converted: Path, tmp_path: Path) -> None:
    """A file's name may be no UTF-8, which ended in a traceback, or hold escape sequences and line ends."""
    for name in (b"model-\xff.safetensors", b"model-\x1b[31m.safetensors", b"model-\n.safetensors"):
        folder = tmp_path / str(name)
        shutil.copytree(converted, folder)
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()
        result = spqt("inspect", folder)
        assert_error(result, 3, "not part of this model")
        assert b"\x1b" not in result.stderr
        assert result.stderr.count(b"\n") == 2  # the cause and the hint


def test_fault_68_summaries_do_not_act_on_a_terminal(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(converted, folder)
    config_of(folder, model_type="llama\x1b[2J")
    assert b"\x1b" not in spqt("inspect", folder).stdout


def test_json_has_null_for_what_is_no_number(calibrated: Path, tmp_path: Path) -> None:
    """One window has no standard error; Python would write NaN, which other readers of JSON refuse."""
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    result = spqt("eval", tmp_path / "text.txt", "--model", calibrated, "--windows", 1, "--json")
    assert result.returncode == 0, result.stderr.decode()
    assert b"null" in result.stdout
    json.loads(result.stdout, parse_constant=pytest.fail)


def test_a_path_that_may_not_be_read_is_bad_input() -> None:
    """Typer would call it a wrong flag. Root may read anything, so the declarations are looked at."""
    hints = [get_type_hints(command, include_extras=True) for command in main.COMMANDS.values()]
    paths = [hint for each in hints for hint in each.values() if "Path" in str(hint)]
    assert len(paths) == 26
    assert not [str(hint) for hint in paths if hint.__metadata__[0].readable or hint.__metadata__[0].exists]
