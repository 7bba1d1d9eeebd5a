"""A command line of mlx_lm.generate or mlx_lm.convert works here: same flags, same defaults, same meaning."""

import argparse
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import typer

from spqt_cli.cli import flags, main, mlx_lm, worker
from tests.cli.test_commands import assert_error, spqt

# Where a default of ours is another one, and why.
OTHER_DEFAULTS = {
    "--model": "no model is fetched that nobody named",
    "--prompt": "stdin is read",
    "--max-tokens": "longer answers",
    "--seed": "greedy by default, and drawn anew where not",
    "--verbose": "the same, as text",
    "--mlx-path": "named after the model",
    "--q-group-size": "the preset's",
    "--q-bits": "the preset's",
}


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


GENERATE, CONVERT = (importlib.import_module(f"mlx_lm.{name}") for name in ("generate", "convert"))


def theirs(module: ModuleType) -> argparse.ArgumentParser:
    return module.setup_arg_parser() if module is GENERATE else module.configure_parser()


@pytest.mark.parametrize(("command", "module"), [("generate", GENERATE), ("convert", CONVERT)])
def test_every_flag_has_its_name_its_kind_and_its_default(command: str, module: ModuleType):
    ours = {}
    for parameter in typer.main.get_command(main.app).commands[command].params:
        ours.update(dict.fromkeys(parameter.opts, parameter))
    for action in theirs(module)._actions:
        for name in action.option_strings:
            if action.dest == "help":
                continue
            assert name in ours, f"{command} lacks {name}"
            one = ours[name]
            assert {name, *one.opts} >= set(action.option_strings), f"{name} is another flag's here"
            assert one.is_flag == (action.nargs == 0), f"{name} takes a value in one of both"
            if not OTHER_DEFAULTS.get(action.option_strings[0]) and one.default != action.default:
                assert not one.default, f"{name}: {one.default}, there {action.default}"
                assert not action.default, f"{name}: {one.default}, there {action.default}"


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch):
    parser = GENERATE.setup_arg_parser()
    parser.add_argument("--new-one")
    monkeypatch.setattr(GENERATE, "setup_arg_parser", lambda: parser)
    with pytest.raises(AssertionError, match="lacks --new-one"):
        test_every_flag_has_its_name_its_kind_and_its_default("generate", GENERATE)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["generate", "--image", "a.png"], 4, "text models"),
        (["generate", "-qa"], 4, "--quantize-activations"),
        (["generate", "--use-default-chat-template", "--ignore-chat-template"], 2, "exclude"),
        (["generate", "--prompt-cache-file", "x", "--draft-model", "y"], 2, "draft model"),
        (["convert", "-d"], 4, "mlx_lm.convert -d"),
        (["convert", "-q", "-d"], 2, "exclude"),
        (["convert", "--q-mode", "mxfp4"], 4, "affine"),
        (["convert", "--quant-predicate", "mixed_4_6"], 4, "--preset mixed"),
    ],
)
def test_what_zigzag_can_not_do_is_refused(line: list[str], code: int, says: str):
    assert_error(spqt(*line, "--model", "org/name", *(["-p", "x"] * (line[0] == "generate"))), code, says)


def test_a_line_of_mlx_lm_convert(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = spqt(
        "convert", "--hf-path", checkpoint, "--mlx-path", out, "-q", "--q-bits", 4, "--q-group-size", 32,
        "--q-mode", "affine", "--dtype", "float32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    assert b"next:" in result.stderr  # -q is not --quiet
    assert (out / "config.json").is_file()


def test_verbose_is_quiet_the_other_way(calibrated: Path):
    words = ("generate", "--model", calibrated, "-p", "fox", "-m", 2, "--verbose")
    assert b"tok/s" in spqt(*words, "True").stderr
    assert spqt(*words, "false").stderr == b""


def test_why_more_is_read_than_stored_is_told_where_it_was_asked(calibrated: Path, monkeypatch):
    from spqt_cli.decode import session

    monkeypatch.setattr(session, "more_than_stored", lambda *_: "the reason")
    words = ("generate", "--model", calibrated, "-p", "fox", "-m", 2)
    plain, verbose = (spqt(*words, *more).stderr for more in ((), ("--verbose", "True")))
    assert b"MB of weights a token" in plain
    assert b"the reason" not in plain
    assert b"\n  the reason\n" in verbose


@pytest.fixture
def cached(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The beginning of a prompt, as mlx-lm's own command stores it."""
    file = tmp_path / "cache.safetensors"
    monkeypatch.setattr("sys.argv", ["spqt"])
    mlx_lm.run(
        ["cache_prompt", "--model", str(calibrated), "--prompt", "the quick brown",
         "--prompt-cache-file", str(file)]
    )  # fmt: skip
    return file


def test_a_prompt_goes_on_after_its_cache(calibrated: Path, cached: Path):
    run = ("generate", "--model", calibrated, "--dense", "-m", 12, "--json", "-p")
    whole = json.loads(spqt(*run, "the quick brown fox").stdout)
    rest = json.loads(spqt(*run, " fox", "--prompt-cache-file", cached).stdout)
    assert rest["prompt_tokens"] < whole["prompt_tokens"]
    assert rest["text"] == whole["text"]


def test_caches_that_will_not_do(calibrated: Path, converted: Path, cached: Path, tmp_path: Path):
    run = ("generate", "-p", "fox", "-m", 2, "--model")
    (tmp_path / "text").write_text("no cache")
    weights = next(calibrated.glob("*.safetensors"))
    for file, code, says in [
        (tmp_path / "gone", 3, "not found"),
        (tmp_path / "text", 3, "text"),
        (weights, 3, "no cache of a prompt"),
    ]:
        assert_error(spqt(*run, calibrated, "--prompt-cache-file", file), code, says)
    assert_error(spqt(*run, converted, "--prompt-cache-file", cached), 2, "was made with the model")


def test_completion_completes_values(calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    assert flags.presets("sm") == ["small", "smollm2"]
    assert flags.values("gptq", "full")("f") == ["full"]
    monkeypatch.chdir(calibrated.parent)
    assert flags.models("tiny") == [calibrated.name]
    parent = calibrated.parent
    assert flags.models(f"{parent}/") == [str(calibrated)]
    assert flags.models(f"{parent.parent}/{parent.name}") == [f"{parent}/"]
    assert flags.models("gone/") == []


def test_a_shell_asks_for_completions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_SPQT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "spqt convert --preset sm")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert spqt().stdout.split() == [b"small", b"smollm2"]
