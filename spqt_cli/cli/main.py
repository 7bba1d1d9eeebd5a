"""The `spqt` command: names the commands, runs one, turns errors into a line and an exit code.

Only Typer and Rich are imported here; each command imports its module when it runs.
"""

import contextlib
import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from spqt_cli.cli import (
    adapter,
    bench,
    calibrate,
    chat,
    compare,
    convert,
    doctor,
    ending,
    evaluate,
    fit,
    fuse,
    generate,
    inspect,
    list_models,
    list_presets,
    mlx_lm,
    output,
    profile,
    serve,
    several,
    usage,
    verify,
    worker,
)
from spqt_cli.errors import ResourceError, SpqtError, without_mlx
from spqt_cli.system import launched
from spqt_cli.system.terminal import harmless
from spqt_cli.version import __version__

BUG = 70
RESUMED = ("convert", "fit", "calibrate")  # commands that keep the progress of an interrupted run
FULL = (errno.ENOSPC, errno.EDQUOT)

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


def _until_the_pipe_closes(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, ending quietly when nobody reads its output any more (Click would exit with 1)."""

    @functools.wraps(command)
    def quietly(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return quietly


COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert.convert,
    "fit": fit.fit,
    "adapter": adapter.adapter,
    "fuse": fuse.fuse,
    "calibrate": calibrate.calibrate,
    "generate": generate.generate,
    "run": generate.generate,
    "chat": chat.chat,
    "compare": compare.compare,
    "serve": serve.serve,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "list": list_models.list_models,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "presets": list_presets.list_presets,
    "profile": profile.profile,
    "doctor": doctor.doctor,
}
EXAMPLES = {
    "convert": "spqt convert org/name -o my-model",
    "fit": "spqt fit my-model org/name -o my-fitted-model",
    "adapter": "spqt adapter peft-folder -o my-adapter",
    "fuse": "spqt fuse my-model my-adapter -o my-fused-model",
    "calibrate": "spqt calibrate my-model --sparsity 0.4",
    "generate": 'spqt generate my-model --prompt "Why is the sky blue?"',
    "run": 'spqt run my-model "Why is the sky blue?"',
    "chat": "spqt chat my-model --sparsity 0.4",
    "compare": 'spqt compare my-model --prompt "Why is the sky blue?" --sparsity 0,0.4',
    "serve": "spqt serve my-model --port 8080",
    "eval": "spqt eval my-model text.txt --sparsity 0.2:0.6:0.1",
    "bench": "spqt bench my-model",
    "list": "spqt list",
    "inspect": "spqt inspect my-model",
    "verify": "spqt verify my-model",
    "presets": "spqt presets",
    "profile": "spqt profile show",
    "doctor": "spqt doctor --selftest",
}
SAME = {"run": "The same as generate."}  # commands by another name


def _first_sentence(text: str) -> str:
    """For the list of commands; Click would cut it at the line's end."""
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())


for _name, _command in COMMANDS.items():
    _summary = SAME.get(_name) or _first_sentence(_command.__doc__ or "")
    app.command(_name, short_help=_summary, epilog=f"Example: {EXAMPLES[_name]}")(
        _until_the_pipe_closes(_command)
    )
app.command(
    "mlx-lm",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help=_first_sentence(mlx_lm.mlx_lm.__doc__ or ""),
)(mlx_lm.mlx_lm)


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    if launched.size() == 1:  # else it ends at once: it may wait for the others where Python is not asked
        with ending.by_exceptions():
            _main()
        return
    with several.one_of_them("--debug" in sys.argv):
        _main()


def _main() -> None:
    arguments = sys.argv[1:]
    passthrough = "mlx-lm" in arguments[:2]  # its own options follow; ours would be taken from them
    debug = "--debug" in (arguments[: arguments.index("mlx-lm")] if passthrough else arguments)
    if debug:
        arguments = [argument for argument in arguments if argument != "--debug"]
        sys.argv[1:] = arguments
    wants_json = "--json" in arguments and not passthrough
    try:
        if worker.wanted(arguments):
            sys.exit(worker.run(["--debug", *arguments] if debug else arguments))
        worker.follow_parent()
        sys.exit(_run(arguments))
    except SpqtError as error:
        _fail(error, debug, wants_json)
    except ImportError as error:
        if (missing := without_mlx(error)) is None:
            _bug(error, debug, wants_json)
        _fail(missing, debug, wants_json)
    except (KeyboardInterrupt, typer.Abort):
        _say_interrupted(arguments)
        sys.exit(128 + signal.SIGINT)
    except MemoryError:
        _fail(
            ResourceError("out of memory", "close other programs, or use a smaller model"), debug, wants_json
        )
    except OSError as error:
        if error.errno in FULL:  # what stdout goes to; whatever we write ourselves has its own error
            _fail(ResourceError("the output's disk is full", "free some space"), debug, wants_json)
        if error.filename is None:
            _bug(error, debug, wants_json)
        cause = f"{str(error.filename)[:200]} can't be used: {error.strerror}"
        _fail(SpqtError(cause, "check the path and its permissions"), debug, wants_json)
    except Exception as error:  # whatever is left is a bug of ours, not the user's
        if usage.is_wrong(error):
            _say_wrong(error, arguments, wants_json)
        _bug(error, debug, wants_json)


def _run(arguments: list[str]) -> int | None:
    """The exit code of a command; Typer makes Ctrl-C one, which is said."""
    if launched.size() > 1:
        several.check(arguments)
    code: int | None = app(standalone_mode=False, prog_name="spqt")
    if code == 128 + signal.SIGINT:
        _say_interrupted(arguments)
    return code


def _say_interrupted(arguments: list[str]) -> None:
    """That Ctrl-C ended it, and whether it lost nothing; on a line of its own, as a terminal echoes ^C."""
    resumed = {*arguments[:2]} & set(RESUMED) and not {"--dry-run", "--remove"} & set(arguments)
    said = "stopped; the same command goes on where it was" if resumed else "interrupted"
    with contextlib.suppress(OSError):
        output.end_line()
        typer.echo(f"spqt: {said}", err=True)


def _say_wrong(error: Any, arguments: list[str], wants_json: bool) -> NoReturn:
    """What Typer says of a command line that it can't take, as other errors are said."""
    if (told := usage.as_line(error, arguments, EXAMPLES)) is None:
        error.show()
        sys.exit(error.exit_code)
    told.exit_code = error.exit_code
    _fail(told, False, wants_json)


def _fail(error: SpqtError, debug: bool, wants_json: bool) -> NoReturn:
    if debug:
        raise error
    code = error.exit_code
    if launched.size() > 1:
        several.fail(error)
    if wants_json:
        _as_json(error.cause, error.hint, code)
    for line in [f"spqt: {error.cause}"] + ([f"  hint: {error.hint}"] if error.hint else []):
        typer.echo(harmless(line.replace("\n", " ")), err=True)  # names in it may be a hostile model's
    sys.exit(code)


def _as_json(cause: str, hint: str, code: int) -> None:
    with contextlib.suppress(OSError):  # a full disk is the error itself
        typer.echo(json.dumps({"error": {"cause": cause, "hint": hint, "exit_code": code}}))


def _bug(error: Exception, debug: bool, wants_json: bool) -> NoReturn:
    if debug:
        raise error
    bug = SpqtError(
        f"this is a bug in spqt: {type(error).__name__}: {error}",
        "run it again with --debug and report what it prints",
    )
    bug.exit_code = BUG
    _fail(bug, debug, wants_json)
