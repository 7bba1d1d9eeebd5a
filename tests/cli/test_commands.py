"""The command line: one line per error, the right exit code, stdout for results only."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import huggingface_hub
import pytest

from spqt_cli.cli import main, worker
from tests import ROOT
from tests.conftest import tiny_checkpoint


def process(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "spqt_cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )


def spqt(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run the command in this process, which has everything imported: the same result, sooner."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), write_through=True) for name in ("stdout", "stderr")}
    streams["stdin"] = io.TextIOWrapper(io.BytesIO(stdin))
    kept = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr", "argv")}
    handler = signal.getsignal(signal.SIGTERM)
    code: object = 0
    try:
        for name, stream in streams.items():
            setattr(sys, name, stream)
        sys.argv = ["spqt", *map(str, arguments)]
        main.main()
    except SystemExit as end:
        code = end.code
    finally:
        for name, value in kept.items():
            setattr(sys, name, value)
        signal.signal(signal.SIGTERM, handler)
    out, err = (streams[name].buffer.getvalue() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(list(arguments), int(code or 0), out, err)


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    """In this process there is no child to hand over to."""
    monkeypatch.setenv(worker.MARK, str(os.getpid()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def assert_error(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One cause, a hint, no traceback, nothing on stdout."""
    error = result.stderr.decode()
    assert result.returncode == code, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert result.stdout == b""


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = (
        "import sys; from spqt_cli.cli import main;"
        "assert main.app.registered_commands;"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert b"generate" in spqt("--help").stdout


def test_every_command_has_help():
    for command in main.COMMANDS:
        result = spqt(command, "--help")
        assert result.returncode == 0, command
        assert b"Usage" in result.stdout


def test_convert_calibrate_generate(checkpoint, tmp_path, monkeypatch):
    """The main job on a tiny model, in processes of its own, worker and all."""
    monkeypatch.delenv(worker.MARK)
    output = tmp_path / "out"
    result = process("convert", checkpoint, "-o", output, "--q-group-size", "32")
    assert result.returncode == 0, result.stderr.decode()
    result = process("calibrate", output, "--sparsity", "0.3", "--tokens", "1024", "--json")
    assert result.returncode == 0, result.stderr.decode()
    assert isinstance(json.loads(result.stdout), dict)
    result = process("generate", "--model", output, "--prompt", "the quick", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr.decode()
    assert b"tok/s" not in result.stdout
    for word in (b"tok/s", b"backend", b"skipped", b"MB of weights a token"):
        assert word in result.stderr
    result = process("calibrate", output, "--remove")
    assert result.returncode == 0, result.stderr.decode()
    result = process("generate", "--model", output, "--prompt", "the quick", "--max-tokens", "4")
    assert b"spqt calibrate" in result.stderr


def test_json_holds_text_and_statistics(calibrated):
    result = spqt("generate", "--model", calibrated, "--prompt", "fox", "--max-tokens", "6", "--json")
    answer = json.loads(result.stdout)
    assert answer["generation_tokens"] == 6
    assert 0 < answer["sparsity"] < 1
    assert isinstance(answer["text"], str)


@pytest.mark.parametrize("arguments", [["--prompt", "-"], []])
def test_the_prompt_comes_from_stdin(calibrated, arguments):
    piped = spqt("generate", "--model", calibrated, "-m", "6", "-q", *arguments, stdin=b"the box")
    typed = spqt("generate", "--model", calibrated, "-m", "6", "-q", "--prompt", "the box")
    assert piped.returncode == 0, piped.stderr.decode()
    assert piped.stdout == typed.stdout


def test_compare_shows_each_sparsity(calibrated):
    result = spqt("compare", "--model", calibrated, "-p", "the fox", "--sparsity", "0,0.3", "-m", "6")
    assert result.returncode == 0, result.stderr.decode()
    for word in (b"dense", b"30%", b"KL to dense", b"skipped: of the Zigzag", b"kipping"):
        assert word in result.stdout
    steps = ("answering: dense", "warming up", "perplexity of the answers", "scoring windows")
    assert re.findall(r"^  0%  (.*)$", result.stderr.decode(), re.M) == [*steps]


def test_compare_reads_the_prompt_as_generate_does(calibrated):
    flags = ("--model", calibrated, "--sparsity", "0", "-m", "4", "--json")
    piped, typed, alone, beside = (
        json.loads(spqt("compare", *prompt, *flags, stdin=b"the fox").stdout)
        for prompt in (("-p", "-"), ("-p", "the fox"), ("the fox",), (calibrated, "the fox"))
    )
    assert piped[0]["text"] == typed[0]["text"] == alone[0]["text"] == beside[0]["text"]
    assert_error(spqt("compare", calibrated, "the", "-p", "fox"), 2, "two prompts")
    assert spqt("compare", *flags, "-p", "the fox").stderr == b""
    assert piped[0]["statistics"]["prompt_tokens"] == typed[0]["statistics"]["prompt_tokens"]


def test_inspect_and_verify(calibrated):
    summary = json.loads(spqt("inspect", calibrated, "--json").stdout)
    assert summary["layers"] == 14
    assert summary["calibration"]["sparsity"] == 0.4
    assert b"intact" in spqt("verify", calibrated).stdout


def test_inspect_and_generate_say_how_many_blocks_run_fused_and_why_others_do_not(calibrated):
    said = "2 do not: backend stock has no fused steps"
    reasons = {"backend stock has no fused steps": 2}
    expected = {"blocks": 2, "fused": 0, "reasons": reasons, "attention": {}, "mixtures": {}, "experts": 0}
    text = process("inspect", calibrated, SPQT_BACKEND="stock").stdout.decode()
    assert f"on backend stock 0 of 2 blocks run fused; {said}" in text
    facts = json.loads(process("inspect", calibrated, "--json", SPQT_BACKEND="stock").stdout)
    assert facts["fused_blocks"] == expected
    asked = ("generate", "--model", calibrated, "-p", "fox", "-m", "3")
    result = process(*asked, SPQT_BACKEND="stock")
    assert f"| 0 of 2 blocks run fused; {said}" in result.stderr.decode()
    result = json.loads(process(*asked, "--json", SPQT_BACKEND="stock").stdout)
    assert result["fused_blocks"] == expected


def test_doctor_names_the_backend():
    result = process("doctor", SPQT_BACKEND="stock")
    assert result.returncode == 0, result.stderr.decode()
    assert b"stock (asked for by SPQT_BACKEND)" in result.stdout
    assert_error(process("doctor", SPQT_BACKEND="cuda"), 2, "SPQT_BACKEND", "stock")


def test_fault_39_empty_prompt(calibrated):
    assert_error(spqt("generate", "--model", calibrated, "--prompt", " "), 2, "empty", "hint")
    assert_error(spqt("generate", "--model", calibrated), 2, "empty")


def test_fault_40_no_tokens(calibrated):
    assert_error(spqt("generate", "--model", calibrated, "-p", "x", "-m", "0"), 2, "--max-tokens 0")


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_piped_prompt_loses_its_final_newline_and_no_other(calibrated, ending):
    flags = ("generate", "--model", calibrated, "-m", "1", "-p", "-", "--ignore-chat-template", "--json")

    def tokens(text: bytes) -> int:
        return json.loads(spqt(*flags, stdin=text).stdout)["prompt_tokens"]

    assert tokens(b"fox" + ending) == tokens(b"fox")
    assert tokens(b"fox" + 2 * ending) > tokens(b"fox")


def test_dense_with_a_sparsity_is_refused(calibrated):
    flags = ("generate", calibrated, "--prompt", "fox", "--dense", "--sparsity")
    for share in ("0", "0.3"):
        assert_error(spqt(*flags, share), 2, "--dense and --sparsity exclude one another")


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_one_window_has_no_standard_error(calibrated, tmp_path, json_flag):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    result = spqt("eval", calibrated, tmp_path / "text.txt", "--windows", "1", *json_flag)
    assert result.returncode == 0, result.stderr
    assert b"nan" not in result.stdout.lower()
    if json_flag:
        assert {row["perplexity_se"] for row in json.loads(result.stdout)["variants"]} == {None}
    else:
        assert " ± -" in result.stdout.decode()


@pytest.mark.parametrize("name", ["./no/such", "models/missing", "~/missing", "a/b/c", "org/a.safetensors"])
def test_a_missing_path_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "models").mkdir()
    assert_error(spqt("generate", name, "--prompt", "x"), 3, "is not found")
    assert_error(spqt("convert", name, "-o", "out"), 3, "is not found")
    assert_error(spqt("inspect", name), 3, "is not found")


def test_a_name_without_a_folder_of_its_org_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(repo, **_):
        asked.append(repo)
        raise huggingface_hub.errors.OfflineModeIsEnabled("off")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_error(spqt("generate", "org/name-v1.5", "--prompt", "x"), 3, "org/name-v1.5 is no path here")
    assert asked == ["org/name-v1.5"]


def test_fault_42_stdin_is_not_utf8(calibrated):
    assert_error(spqt("generate", "--model", calibrated, "-p", "-", stdin=b"caf\xe9"), 3, "UTF-8", "byte 3")


def test_fault_43_closed_pipe_is_quiet(calibrated, monkeypatch):
    monkeypatch.delenv(worker.MARK)
    command = [
        sys.executable,
        "-m",
        "spqt_cli",
        "generate",
        "--model",
        str(calibrated),
        "-p",
        "x",
        "-m",
        "60",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0
    assert b"Traceback" not in error
    assert b"Broken" not in error


@pytest.mark.parametrize("command", ["generate", "convert", "calibrate", "inspect", "verify"])
def test_missing_path_is_bad_input(command, tmp_path):
    missing = tmp_path / "nowhere"
    arguments = ["--model", missing, "-p", "x"] if command == "generate" else [missing]
    assert_error(spqt(command, *arguments), 3, "nowhere")


@pytest.mark.parametrize("wrong", [["--q-bits", "7"], ["--q-group-size", "48"]])
def test_fault_27_bad_bits_or_group(checkpoint, tmp_path, wrong):
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / "out", *wrong), 2)
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_is_unsupported(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "quux9"}))
    assert_error(spqt("convert", source, "-o", tmp_path / "out"), 4, "quux9")


def test_output_that_exists_is_refused(checkpoint, converted):
    before = sorted(path.name for path in converted.iterdir())
    assert_error(spqt("convert", checkpoint, "-o", converted), 7)
    assert sorted(path.name for path in converted.iterdir()) == before


def test_generate_on_an_unconverted_model_names_convert(checkpoint):
    assert_error(spqt("generate", "--model", checkpoint, "-p", "x"), 3, "spqt convert")


def test_an_error_is_a_json_object_where_json_was_asked(tmp_path):
    result = spqt("inspect", tmp_path / "nowhere", "--json")
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == result.returncode == 3
    assert error["cause"]


def test_a_wrong_flag_is_a_json_object_where_json_was_asked(converted):
    result = spqt("inspect", converted, "--json", "--nosuch")
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == result.returncode == 2
    assert "--nosuch" in error["cause"]


def test_usage_names_the_command_as_it_was_typed():
    said = process("inspect", "--nosuch").stderr.decode()
    hint = "for example: spqt inspect my-model; spqt inspect -h shows what it takes"
    assert said == f"spqt: no such option: --nosuch\n  hint: {hint}\n"


@pytest.mark.parametrize(
    ("typed", "cause", "hint"),
    [
        ("calibrat x", "no such command 'calibrat'", "did you mean 'calibrate'? spqt -h lists the commands"),
        ("run m --promt hi", "no such option: --promt", "did you mean --prompt or --prompt-file? "),
        ("eval --text a.txt", "no such option: --text", "for example: spqt eval my-model text.txt"),
        ("calibrate", "missing argument 'model'", "for example: spqt calibrate my-model"),
        ("calibrate m --sparsity half", "--sparsity half: input should be a valid number", "calibrate -h"),
        ("run m hi -m=ten", "-m=ten: input should be a valid integer", "spqt run -h"),
        ("calibrate m --seed -3", "--seed -3: input should be greater than", "spqt calibrate -h"),
        ("run m hi there", "too many arguments: there", "spqt run -h"),
        ("run m -p", "option '-p' requires an argument", "spqt run -h"),
        ("profile what", "action: 'what' is not one of 'show', 'clear'", "spqt profile -h"),
        ("--nosuch", "no such option: --nosuch", "spqt -h"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_a_hint(typed, cause, hint):
    result = spqt(*typed.split())
    assert_error(result, 2)
    first, second = result.stderr.decode().splitlines()
    assert first.startswith(f"spqt: {cause}")
    assert second.startswith("  hint: ")
    assert hint in second


def test_without_a_command_the_help_is_shown():
    result = spqt()
    assert result.returncode == 2
    assert "Commands:" in (result.stdout + result.stderr).decode()


def test_fault_45_without_mlx_the_install_command_is_shown(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ModuleNotFoundError('mlx', name='mlx')")
    result = process("doctor", PYTHONPATH=str(tmp_path))
    assert_error(result, 6, "spqt[cpu]", "spqt[cuda13]")


def test_fault_50_a_data_set_name_is_no_text(converted):
    """Texts are files: nothing is fetched, and the message says which text would do."""
    assert_error(spqt("calibrate", converted, "--data", "wikitext"), 3, "wikitext", "hint")


def test_fault_69_no_token_in_any_output():
    """The hub's token goes to the hub alone: not into errors, not into tracebacks."""
    secret = "hf_" + "S3cr3t" * 5
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": secret}
    for debug in ([], ["--debug"]):
        result = process(*debug, "convert", "some/model", "--json", HF_HUB_ETAG_TIMEOUT="1", **nobody)
        assert result.returncode != 0
        assert secret.encode() not in result.stdout + result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = process("--debug", "inspect", tmp_path / "nowhere")
    assert b"Traceback" in result.stderr


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    assert "make run" in readme
    assert "make test" in readme
