"""What a model writes never acts on a terminal."""

from spqt_cli.system.terminal import harmless


def test_fault_68_escape_sequences_become_pictures():
    assert harmless("\x1b[2Jhello\x07\x9b31m") == "␛[2Jhello␇\ufffd31m"


def test_text_passes_unchanged():
    text = "line\n\ttab – naïve 日本語 🙂"
    assert harmless(text) == text


def test_carriage_return_cannot_overwrite_a_line():
    assert "\r" not in harmless("rm -rf\rls")
