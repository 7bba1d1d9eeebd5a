"""The `spqt` command: names the commands, runs one, turns errors into a line and an exit code.

Only Typer and Rich are imported here; each command imports its module when it runs.
"""

import json
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from spqt_cli import __version__, cli_make, cli_run
from spqt_cli.errors import BackendError, SpqtError, UsageError

INSTALL_HINT = (
    'pip install "spqt[cpu]" (Linux without a GPU), "spqt[cuda13]" or "spqt[cuda12]" (NVIDIA); '
    "on Apple silicon: pip install --force-reinstall spqt"
)
BUG = 70

app = typer.Typer(
    name="spqt",
    help="Run quantized language models faster by skipping inactive channels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spqt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


app.command("convert")(cli_make.convert)
app.command("calibrate")(cli_make.calibrate)
app.command("inspect")(cli_make.inspect)
app.command("verify")(cli_make.verify)
app.command("generate")(cli_run.generate)
app.command("compare")(cli_run.compare)
app.command("eval")(cli_run.evaluate)
app.command("doctor")(cli_run.doctor)
app.command(
    "mlx-lm",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(cli_run.mlx_lm)


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    arguments = sys.argv[1:]
    passthrough = "mlx-lm" in arguments[:2]  # its own options follow; ours would be taken from them
    debug = "--debug" in (arguments[: arguments.index("mlx-lm")] if passthrough else arguments)
    if debug:
        arguments = [argument for argument in arguments if argument != "--debug"]
        sys.argv[1:] = arguments
    signal.signal(signal.SIGTERM, _terminate)
    wants_json = "--json" in arguments and not passthrough
    try:
        app()
    except SpqtError as error:
        _fail(error, error.exit_code, debug, wants_json)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "mlx":
            _bug(error, debug, wants_json)
        missing = BackendError("MLX is not installed, or this build of it lacks its library", INSTALL_HINT)
        _fail(missing, missing.exit_code, debug, wants_json)
    except ImportError as error:
        if "libmlx" not in str(error) and "mlx" not in (error.name or ""):
            _bug(error, debug, wants_json)
        missing = BackendError(f"MLX can't be loaded: {error}", INSTALL_HINT)
        _fail(missing, missing.exit_code, debug, wants_json)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: nothing to report
        sys.exit(0)
    except MemoryError as error:
        _fail(
            SpqtError("out of memory", "close other programs, or use a smaller model"), 5, debug, wants_json
        )
        raise error
    except Exception as error:  # the last line of defence: ours to mend, not the user's
        _bug(error, debug, wants_json)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(error: Exception, code: int, debug: bool, wants_json: bool) -> NoReturn:
    if debug:
        raise error
    cause, hint = getattr(error, "cause", str(error)), getattr(error, "hint", "")
    if wants_json:
        typer.echo(json.dumps({"error": {"cause": cause, "hint": hint, "exit_code": code}}))
    typer.echo(f"spqt: {cause}" + (f"\n  hint: {hint}" if hint else ""), err=True)
    sys.exit(code)


def _bug(error: Exception, debug: bool, wants_json: bool) -> NoReturn:
    if debug:
        raise error
    cause = f"this is a bug in spqt: {type(error).__name__}: {error}"
    _fail(SpqtError(cause, "run it again with --debug and report what it prints"), BUG, debug, wants_json)


__all__ = ["UsageError", "app", "main"]
