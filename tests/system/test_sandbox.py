"""Templates are a model's code: they may not hang or exhaust the machine."""

import resource
import signal
import sys

import pytest

from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError, Terminated, UnsupportedError
from spqt_cli.system import sandbox

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GIANT = "{{ 'x' * 4000000000 }}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def encode_with(calibrated, template: str) -> None:
    loaded = session.load(calibrated)
    loaded.tokenizer.chat_template = template
    generate.encode(loaded, Prompt("hello"))


def test_fault_66_nested_loops_are_stopped(calibrated):
    with pytest.raises(SpqtError, match="took more than"):
        encode_with(calibrated, NESTED)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces an address-space limit")
def test_fault_66_giant_strings_are_stopped(calibrated):
    with pytest.raises(SpqtError, match="memory"):
        encode_with(calibrated, GIANT)


def test_fault_66_escapes_are_blocked(calibrated):
    with pytest.raises(SpqtError, match="template"):
        encode_with(calibrated, ESCAPE)


def test_limits_are_lifted_afterwards():
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with sandbox.bounded("nothing"):
        pass
    with pytest.raises(ZeroDivisionError), sandbox.bounded("a mistake"):
        print(1 / 0)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_library_that_ends_the_process_is_unsupported_and_keeps_off_stdout(capsys):
    def leave() -> None:
        print("install hf_olmo")
        sys.exit(1)

    with pytest.raises(UnsupportedError, match="x ends the process: install hf_olmo"), sandbox.no_exit("x"):
        leave()
    with sandbox.no_exit("chatty"):
        print("loading")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err == "loading\n"


def test_sigterm_is_no_exit_of_a_library():
    with pytest.raises(Terminated) as caught, sandbox.no_exit("olmo"):
        raise Terminated(143)
    assert caught.value.code == 143
