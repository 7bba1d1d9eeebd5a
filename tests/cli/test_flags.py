"""Flags: the model as an argument, by --model, twice or not at all; generate's and the options they fill."""

import json
import os
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path

import pytest

from spqt_cli.cli import flags, generate, worker
from spqt_cli.decode.options import Cache, Loading, Options, Prompt, Sampling, picked
from spqt_cli.errors import UsageError
from tests.cli.test_commands import assert_error, spqt


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


FLAGS = {
    "generate": ["-p", "the fox", "-m", 4, "--json"],
    "compare": ["-p", "the fox", "-m", 4, "--sparsity", "0.3", "--json"],
    "bench": ["-p", 2, "-g", 2, "-r", 2, "--json"],
}


def answer(command: str, *names: object) -> object:
    """What a command printed, without its times."""
    result = spqt(command, *names, *FLAGS[command])
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    if command == "bench":
        return found["settings"]["model"]
    return found["text"] if command == "generate" else found[0]["text"]


@pytest.mark.parametrize("command", FLAGS)
def test_the_model_may_be_an_argument(command, calibrated):
    as_option = answer(command, "--model", calibrated)
    assert answer(command, calibrated) == as_option
    assert answer(command, calibrated, "--model", calibrated) == as_option


def test_eval_takes_model_and_text(calibrated, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen liquor jugs " * 100)
    forms = ([calibrated, text], [text, "--model", calibrated], [calibrated, text, "--model", calibrated])
    results = [spqt("eval", *names, "--windows", 1, "--json") for names in forms]
    assert results[0].returncode == 0, results[0].stderr.decode()
    assert json.loads(results[0].stdout)["text"] == "text.txt"
    assert len({result.stdout for result in results}) == 1


@pytest.mark.parametrize("command", FLAGS)
def test_two_models_are_refused_before_any_is_looked_for(command):
    result = spqt(command, "one/model", "--model", "another/model", *FLAGS[command][:2])
    assert_error(result, 2, "two models", "one/model", "another/model", f"spqt {command} MODEL")


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_no_model_is_refused_before_stdin_is_read(command):
    result = spqt(command, "--prompt", "-", stdin=b"\xff")  # which would be an error of its own
    assert_error(result, 2, "no model", f"spqt {command} MODEL")


def test_bench_without_a_model_or_a_shape():
    assert_error(spqt("bench"), 2, "a model or --shape", "llama-3-8b")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "needed"),
        (["a"], "only a"),
        (["a", "b", "--model", "c"], "two models"),
        (["--model", "c"], "text"),
    ],
)
def test_eval_says_what_is_missing(names, says):
    assert_error(spqt("eval", *names), 2, says, "spqt eval MODEL TEXT")


def test_a_lone_argument_of_eval_is_the_text_only_beside_the_option():
    assert flags.with_texts("t", [], ["m"], "") == (["m"], [Path("t")])
    assert flags.with_texts("m", [Path("t")], [], "") == (["m"], [Path("t")])
    assert flags.with_texts("m", [], [], "", shipped=True) == (["m"], [])
    with pytest.raises(UsageError):
        flags.with_texts("m", [], [], "")


def test_beside_model_options_all_arguments_of_eval_are_texts(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("x")
    assert flags.with_texts(str(one), [other], ["m", "n", "m"], "") == (["m", "n"], [one, other])
    assert flags.with_texts("m", [one, other], ["m", "n"], "") == (["m", "n"], [one, other])
    with pytest.raises(UsageError, match="two models"):
        flags.with_texts("another/model", [one], ["m"], "")


@pytest.mark.parametrize("command", [*FLAGS, "eval"])
def test_help_shows_both_ways(command):
    shown = spqt(command, "--help").stdout.decode()
    assert "[MODEL]" in shown
    assert "--model" in shown


NO_FLAG = {"text", "cache", "on_token", "history", "prompt_cache"}  # fields that generate fills itself
OUTSIDE = {
    "model",
    "model_option",
    "words",
    "prompt",
    "prompt_file",
    "quiet",
    "json_output",
}  # of the command
OF_MLX_LM = {"use_default_chat_template", "prompt_cache_file", "image", "quantize_activations", "verbose"}


def test_every_flag_of_generate_fills_an_option_of_its_name_and_default():
    """What `picked` does not find it leaves out, so a misspelled name would be a flag without effect."""
    given = {name: one.default for name, one in signature(generate.generate).parameters.items()}
    options = {one.name: one.default for kind in (Sampling, Cache, Prompt, Options) for one in fields(kind)}
    assert options.keys() - NO_FLAG | Loading.__annotations__.keys() == given.keys() - OUTSIDE - OF_MLX_LM
    differing = {name for name, default in options.items() if name in given and default != given[name]}
    assert not differing
    assert options["text"] is MISSING


def test_picked_takes_the_flags_of_one_kind():
    given = {"temp": 0.5, "dense": True, "max_tokens": 3}
    assert picked(Sampling, given) == Sampling(temp=0.5)
    assert picked(Options, given) == Options(max_tokens=3, on_token=picked(Options, given).on_token)
    assert picked(Loading, given) == {"dense": True}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Sampling, {"temp": float("nan")}),
        (Cache, {"prefill_step_size": 0}),
        (Options, {"num_draft_tokens": 0}),
    ],
)
def test_a_value_out_of_range_is_refused_before_a_model_is_loaded(kind, values):
    flag = "--" + next(iter(values)).replace("_", "-")
    with pytest.raises(UsageError, match=f"{flag} .* is out of range"):
        kind(**values)
