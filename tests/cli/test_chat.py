"""`spqt chat` in a pipe and at a terminal: messages, commands, errors, how it ends."""

import builtins
import json
import os
from pathlib import Path

import pytest

from spqt_cli.cli import chat, worker
from tests.cli.test_commands import assert_error, spqt


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


def piped(model: Path, text: str, *flags: object):
    return spqt("chat", model, "-m", 4, *flags, stdin=text.encode())


def test_each_line_of_a_pipe_is_answered(calibrated: Path):
    result = piped(calibrated, "the fox\n\na dog\n/quit\nnever\n", "--json")
    assert result.returncode == 0, result.stderr.decode()
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    alone = json.loads(spqt("run", calibrated, "the fox", "-m", 4, "--json").stdout)
    assert first["text"] == alone["text"]
    assert second["generation_tokens"] == 4


def test_stats_and_sparsity_while_talking(calibrated: Path):
    result = piped(calibrated, "/stats\nfox\n/sparsity 60%\ndog\n/sparsity dense\nox\n/stats\n/sparsity\n")
    said = result.stderr.decode()
    assert result.returncode == 0, said
    for words in (
        "nothing was answered yet", "60% of the channels skipped", "  40%: 1 answer, 4 tokens",
        "  60%: 1 answer, 4 tokens", "dense: 1 answer, 4 tokens", "MB of weights a token",
        "cut off by --max-tokens",
    ):  # fmt: skip
        assert words in said
    assert said.splitlines()[-1] == "nothing is skipped"
    assert b"tok/s" not in result.stdout


def test_a_sparsity_of_the_command_line(calibrated: Path):
    found = json.loads(piped(calibrated, "fox\n", "--sparsity", 0.6, "--json").stdout)
    assert found["sparsity"] > 0.45
    assert_error(piped(calibrated, "fox\n", "--sparsity", 0.6, "--dense"), 2, "exclude")


@pytest.mark.parametrize(
    ("line", "says"),
    [("/stast", "did you mean /stats?"), ("/x", "/help lists them"), ("/sparsity much", "no number")],
)
def test_commands_that_there_are_not(calibrated: Path, line: str, says: str):
    assert_error(piped(calibrated, line), 2, says)


def test_help_lists_every_command(calibrated: Path):
    said = piped(calibrated, "/help\n/clear\n").stderr.decode()
    assert [name for name in chat.COMMANDS if name not in said] == []
    assert "forgotten" in said


def test_input_that_is_not_utf8_or_never_ends(calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    assert_error(spqt("chat", calibrated, stdin=b"\xff\n"), 3, "UTF-8")
    monkeypatch.setattr(chat, "LONGEST_LINE", 10)
    assert_error(piped(calibrated, "the quick brown fox"), 3, "longer than")


class Terminal:
    """Stands for a person: gives lines one by one, then Ctrl-D."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def __call__(self, prompt: str = "") -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def typed(model: Path, monkeypatch: pytest.MonkeyPatch, *lines: str):
    monkeypatch.setattr(builtins, "input", Terminal(*lines))
    monkeypatch.setattr(chat, "_is_typed", lambda: True)
    return spqt("chat", model, "-m", 4)


def test_at_a_terminal_an_error_ends_nothing(calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    result = typed(calibrated, monkeypatch, "/stast", "the fox", "/sparsity 7")
    said = result.stderr.decode()
    assert result.returncode == 0, said
    for words in ("/quit ends", "did you mean /stats?", "4 tokens", "not in 0 to 0.95"):
        assert words in said
    assert result.stdout


def test_ctrl_c_ends_the_answer_alone(calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = chat.show, []

    def interrupted(pieces, **options):
        calls.append(None)
        if len(calls) == 1:
            next(pieces)
            raise KeyboardInterrupt
        return real(pieces, **options)

    monkeypatch.setattr(chat, "show", interrupted)
    result = typed(calibrated, monkeypatch, "the fox", "a dog")
    assert result.returncode == 0, result.stderr.decode()
    assert b"(answer ended)" in result.stderr
    assert b"4 tokens" in result.stderr


def test_a_model_that_is_gone_ends_the_conversation(calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C while /sparsity loads: the old model was let go, and the new one is not there."""
    from spqt_cli.decode import session

    real, loads = session.load, []

    def load(*arguments, **options):
        loads.append(None)
        if len(loads) > 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(session, "load", load)
    result = typed(calibrated, monkeypatch, "the fox", "/sparsity 0.6", "a dog")
    assert result.returncode == 130
    assert b"Traceback" not in result.stderr
    assert result.stderr.count(b"4 tokens") == 1


def test_how_answers_are_drawn_can_be_set_while_talking(calibrated: Path):
    lines = "/set max-tokens 2\nfox\n/set temp 0.5\n/set temp default\n/set presence_penalty 1.5\n/set\nox\n"
    result = piped(calibrated, lines)
    said = result.stderr.decode()
    assert result.returncode == 0, said
    for words in ("max_tokens 2", "2 tokens", "temp 0.5", "temp 0\n", "presence_penalty    1.5"):
        assert words in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set tmp 1", "did you mean temp?"), ("/set temp", "no number"), ("/set temp inf", "no number"),
        ("/set temp -1", "out of range"), ("/set top_k 1.5", "no whole number"),
        ("/set top_k 512", "the model has 512 tokens"), ("/set max_tokens 0", "nothing to do"),
        ("/quit now", "no command"),
    ],
)  # fmt: skip
def test_what_can_not_be_set(calibrated: Path, line: str, says: str):
    assert_error(piped(calibrated, line), 2, says)


def test_a_file_is_sent(calibrated: Path, tmp_path: Path):
    (tmp_path / "note.txt").write_text("the quick brown fox")
    loaded, typed = (
        json.loads(piped(calibrated, line, "--json").stdout)
        for line in (f"/load {tmp_path / 'note.txt'}", "the quick brown fox")
    )
    assert loaded["text"] == typed["text"]
    assert_error(piped(calibrated, f"/load {tmp_path / 'not.txt'}"), 3, "near it", "note.txt")
    (tmp_path / "note.txt").write_bytes(b"\xff")
    assert_error(piped(calibrated, f"/load {tmp_path / 'note.txt'}"), 3, "UTF-8")
