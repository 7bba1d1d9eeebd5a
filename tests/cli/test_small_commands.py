"""list, presets, profile, help: what a user types before anything works, or to look around."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from huggingface_hub import constants

from spqt_cli.cli import main, output, presets, worker
from spqt_cli.system import files
from tests.cli.test_commands import assert_error, spqt


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


def test_list(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = spqt("list", calibrated.parent).stdout.decode().splitlines()
    assert str(calibrated) in shown[1]
    assert "40%" in shown[1]
    (found,) = json.loads(spqt("list", calibrated.parent, "--json").stdout)
    assert found["sparsity"] == 0.4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    empty = spqt("list")
    assert (empty.returncode, empty.stdout) == (0, b"")
    assert b"spqt convert" in empty.stderr
    assert_error(spqt("list", "gone"), 3, "gone is no folder")


def test_presets_say_what_they_are_for_in_80_columns():
    shown = spqt("presets").stdout.decode()
    assert max(map(len, shown.splitlines())) <= 80
    for name in presets.names():
        assert re.search(rf"^{name}$", shown, re.MULTILINE)
        assert len(presets.meaning(name)) > 40
    by_name = {one["name"]: one for one in json.loads(spqt("presets", "--json").stdout)}
    assert by_name["fast"]["sparsity"] == 0.5
    assert by_name.keys() == set(presets.names())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = files.cache_folder()
    (folder / "verified").mkdir(parents=True)
    for name in ("kernels.json", "many-rows.json", "profile-x.json", "verified/org--m-1", "mine.txt"):
        (folder / name).write_text("{}")
    return folder


def test_profile_shows_and_clears_its_own_files_alone(cache: Path):
    from spqt_cli.decode import profile

    own = profile.write({}, {"by": "test"})
    shown = json.loads(spqt("profile", "--json").stdout)
    assert {Path(one["path"]).name for one in shown["files"]} == {
        "kernels.json", "many-rows.json", "profile-x.json", own.name, "org--m-1",
    }  # fmt: skip
    assert [one["path"] for one in shown["files"] if one["current"]] == [str(own)]
    text = spqt("profile", "show").stdout.decode()
    assert f"{own.name} (this device's)" in text
    assert b"5 files deleted" in spqt("profile", "clear").stdout
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["mine.txt"]
    assert b"0 files" in spqt("profile", "show").stdout


def test_profile_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert b"0 files" in spqt("profile", "clear").stdout


@pytest.mark.parametrize(("typed", "meant"), [("genrate", "generate"), ("calibrat", "calibrate")])
def test_an_unknown_command_names_its_nearest(typed: str, meant: str):
    assert_error(spqt(typed), 2, f"did you mean '{meant}'")


def test_help_cuts_no_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = [spqt("--help"), *(spqt(name, "--help") for name in main.COMMANDS)]
    text = "\n".join(one.stdout.decode() for one in shown)
    assert text.count("Usage:") == len(main.COMMANDS) + 1
    cut = [line for line in text.splitlines() if line.endswith("...") and "COMMAND" not in line]
    assert [line for line in cut if "[TEXT]..." not in line and "[FOLDER]..." not in line] == []


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_example_in_help_can_be_parsed(name: str):
    shown = " ".join(spqt(name, "--help").stdout.decode().split())
    assert main.EXAMPLES[name] in shown
    program, command, *arguments = shlex.split(main.EXAMPLES[name])
    assert (program, command) == ("spqt", name)
    group = typer.main.get_command(main.app)
    group.commands[name].make_context(name, arguments)


def test_run_is_generate_and_takes_the_prompt_as_an_argument(calibrated: Path):
    flags = ("-m", 4, "--json")
    forms = (
        ["generate", calibrated, "-p", "the fox"],
        ["generate", calibrated, "the fox"],
        ["run", calibrated, "the fox"],
        ["run", "the fox", "--model", calibrated],
    )
    answers = [json.loads(spqt(*form, *flags).stdout) for form in forms]
    assert answers[0]["generation_tokens"] == 4
    assert len({(one["text"], one["prompt_tokens"]) for one in answers}) == 1
    assert_error(spqt("run", calibrated, "the", "-p", "fox"), 2, "two prompts")
    assert_error(spqt("run", calibrated, "the", "--prompt-file", "x"), 2, "exclude")


@pytest.mark.parametrize(("command", "says"), [("calibrate", True), ("inspect", False)])
def test_ctrl_c_says_whether_the_same_command_goes_on(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, command: str, says: bool
):
    from spqt_cli.calibrate import calibrate
    from spqt_cli.cli import describe

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate", interrupted)
    monkeypatch.setattr(describe, "describe", interrupted)
    result = spqt(command, calibrated)
    assert result.returncode == 130
    assert (b"the same command goes on" in result.stderr) == says
    assert (result.stderr == b"spqt: interrupted\n") != says


def test_calibrate_ends_with_a_judgement_and_what_is_next(converted: Path, tmp_path: Path):
    folder = tmp_path / "a model"
    shutil.copytree(converted, folder)
    flags = ("--sparsity", 0.3, "--tokens", 1024, "--method", "fast")
    result = spqt("calibrate", folder, *flags)
    text = (
        "1024 tokens of the shipped text: 512 to find thresholds, 512 held out, of which 256 are prompt and"
    )
    assert f"\n{text} 256 scored\n" in result.stdout.decode()
    assert re.search(
        r"calibrated: method fast, for 30% sparsity, \d\d\.\d% of the Zigzag weights skipped on "
        r"held-out text, KL to dense \d\.\d{3} nats per token, thresholds from 512 tokens\n",
        spqt("inspect", folder).stdout.decode(),
    )
    *_, judgement, after = result.stderr.decode().splitlines()
    assert re.fullmatch(r"KL to dense \d\.\d{3} on held-out text: .*, perplexity about \+\d+%", judgement)
    assert after == f"next: spqt compare '{folder}' --prompt \"Hello\""
    assert b"next" not in spqt("calibrate", folder, *flags, "-q").stderr


def test_in_a_pipe_progress_says_how_long_is_left(monkeypatch: pytest.MonkeyPatch, capsys):
    now = iter([0.0, 1.0, 3.0, 4.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    show = output._plain_lines()
    for done in (1, 3, 4, 60):
        show(done, 120, "windows")
    assert capsys.readouterr().err.splitlines() == [
        "  2%  windows, about 2 min left",
        " 50%  windows, about 2 min left",
    ]


def test_in_a_pipe_each_step_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    show = output._plain_lines()
    for step in ("observing", "refining", "refining", "scoring"):
        for done in range(3):
            show(done, 3, step)
    assert capsys.readouterr().err.splitlines() == ["  0%  observing", "  0%  refining", "  0%  scoring"]


def test_calibrate_says_first_how_long_it_takes(converted: Path, tmp_path: Path):
    shutil.copytree(converted, tmp_path / "m")
    flags = ("--sparsity", 0.3, "--tokens", 1024, "--method", "fast")
    first, second, *_ = spqt("calibrate", tmp_path / "m", *flags).stderr.decode().splitlines()
    assert re.fullmatch(
        r"calibrating takes about \d+ (seconds|minutes) here; an interrupted run goes on .*", first
    )
    assert "observing activations" in second
    for silent in ("--quiet", "--json"):
        assert b"takes" not in spqt("calibrate", tmp_path / "m", *flags, silent).stderr


def test_a_mistyped_path_names_what_is_near(calibrated: Path):
    wrong = str(calibrated)[:-1]
    for command in (["inspect", wrong], ["run", wrong, "hello"], ["calibrate", wrong], ["convert", wrong]):
        assert_error(spqt(*command), 3, f"near it: {calibrated}")


def test_a_source_in_place_of_a_converted_folder(checkpoint: Path, tmp_path: Path):
    (tmp_path / "model.gguf").touch()
    for source in (tmp_path / "model.gguf", checkpoint):
        assert_error(spqt("run", source, "hello"), 3, f"convert it first: spqt convert {source}")
    for asked in (tmp_path, tmp_path / "modle.gguf"):  # the folder that holds it, and a mistyped name
        for command in (["run", asked, "hello"], ["calibrate", asked], ["bench", asked]):
            assert_error(spqt(*command, "-q"), 3, f"first: spqt convert {tmp_path / 'model.gguf'} -o")
    assert_error(spqt("convert", tmp_path, "-o", tmp_path / "out"), 3, "holds model.gguf: name that")


def test_a_gguf_file_is_offered_to_convert_alone(tmp_path: Path):
    for command in (["run", tmp_path, "hello"], ["calibrate", tmp_path], ["verify", tmp_path]):
        result = spqt(*command)
        assert_error(result, 3, "has no config.json", "give a converted folder")
        assert b".gguf" not in result.stderr
    assert_error(spqt("convert", tmp_path), 3, "a hub id or a .gguf file")


@pytest.mark.parametrize("name", ["text.txt", "questions.jsonl", "mine.toml", "prefix.safetensors"])
def test_so_does_a_mistyped_file_that_a_flag_names(calibrated: Path, tmp_path: Path, name: str):
    (tmp_path / name).touch()
    wrong = tmp_path / name.replace(".", "x.")
    command = {
        "text.txt": ["calibrate", calibrated, "--data", wrong],
        "questions.jsonl": ["eval", calibrated, wrong],
        "mine.toml": ["calibrate", calibrated, "--preset", wrong],
        "prefix.safetensors": ["run", calibrated, "hello", "--prompt-cache-file", wrong],
    }[name]
    assert_error(spqt(*command), 3, f"near it: {tmp_path / name}")
