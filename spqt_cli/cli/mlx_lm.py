"""`spqt mlx-lm ...`: mlx-lm's own command line on converted models."""

import contextlib
import os
import sys
from collections.abc import Sequence

import typer

from spqt_cli.errors import SpqtError, Terminated, UnsupportedError, UsageError

# Flags of mlx-lm's commands that name a model to load.
MODEL_FLAGS = ("--model", "--draft-model", "--hf-path", "--quantized-model", "-m")
WRITING = ("generate", "chat", "server", "benchmark", "evaluate")  # commands that generate tokens
# What mlx-lm's commands can't do with a converted model, and what can be done instead. Others run.
QUANTIZES = "it quantizes weights that are not quantized yet, and these are", "give it the source"
REFUSED = {
    "convert": ("it would write a folder that neither mlx-lm nor spqt reads", "convert the source instead"),
    "fuse": ("it knows no Zigzag weights", "spqt fuse MODEL ADAPTER -o FOLDER"),
    "awq": QUANTIZES,
    "dwq": QUANTIZES,
    "dynamic_quant": QUANTIZES,
    "gptq": QUANTIZES,
}
AS_STORED = ("evaluate", "perplexity", "lora")  # whatever this device's profile says
ADAPTED = ("generate", "chat", "server", "cache_prompt")  # commands that put --adapter-path on a model
SHORT_M = tuple(REFUSED)  # where `-m` is the model; with generate it is the number of tokens
DENSE = "note: mlx-lm's perplexity runs many tokens at once, which skips nothing; spqt eval measures skipping"


def mlx_lm(context: typer.Context) -> None:
    """Run an mlx-lm command (chat, server, benchmark, ...) on converted models."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    run(context.args)


def run(arguments: Sequence[str]) -> None:
    """Patch mlx-lm, check the models that the command names, hand over.

    Raises SpqtError for a damaged or edited converted folder, UnsupportedError for a command that can't work
    on one, before any work, and SpqtError for what mlx-lm raises: that is its own.
    """
    if not arguments:
        raise UsageError(
            "which mlx-lm command?", "spqt mlx-lm server --model DIR; spqt mlx-lm --help lists them"
        )
    from spqt_cli.decode import adapter_folder, hooks
    from spqt_cli.system import files

    command = arguments[0]
    converted = [name for name in _models(arguments) if _check(name, command, hooks.wished_sparsity())]
    for path in _named(arguments, ("--adapter-path",)) if command in ADAPTED else ():
        adapter_folder.check(files.expanded(path))
    hooks.install()
    if converted and command == "perplexity":
        print(DENSE, file=sys.stderr)
    if command == "evaluate":
        from spqt_cli.evaluate import lm_eval

        lm_eval.prepare()
    sys.argv = ["mlx_lm", *arguments]
    with contextlib.ExitStack() as around:
        if command in REFUSED:
            around.enter_context(hooks.refusing(_refusal("a converted model", command)))
        if command in AS_STORED:
            around.enter_context(hooks.as_stored())
        if command == "server":
            from spqt_cli.cli import mlx_lm_server

            around.enter_context(mlx_lm_server.ending())
        _hand_over()


def _hand_over() -> None:
    """mlx-lm's command line with sys.argv; what it raises becomes an SpqtError."""
    from mlx_lm import cli

    try:
        cli.main()
    except (SpqtError, MemoryError, BrokenPipeError, EOFError, Terminated):
        raise
    except SystemExit as end:
        if end.code in (None, 0, 2):  # 2: a wrong option, already told
            raise
        raise SpqtError(f"mlx-lm's own command ended with {end.code}", "see what it printed") from None
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise SpqtError(
            f"mlx-lm's own command failed: {type(error).__name__}: {said}",
            "spqt mlx-lm COMMAND --help lists its options; spqt --debug mlx-lm ... shows the traceback",
        ) from error


def _mode(calibrated: float, wished: float | None) -> str:
    """How requests to a model run. calibrated, wished: sparsities, 0 to 1; wished: by SPQT_SPARSITY."""
    sparsity = calibrated if wished is None else wished
    if not sparsity:
        return "all runs dense, nothing is skipped"
    return f"prompts run dense, generated tokens at {sparsity:.0%} sparsity, in batches too"


def _check(name: str, command: str, wished: float | None) -> bool:
    """Whether a model is a converted folder, which is sound then and one that the command can take.

    Raises SpqtError where it is not, and for a path with nothing there.
    """
    from spqt_cli.format import locate
    from spqt_cli.format.folder import Folder, is_converted
    from spqt_cli.system import files

    path = files.expanded(name)
    if not path.exists() and not locate.is_hub_id(name):
        hint = "give a model's folder or a hub id (org/name)"
        raise SpqtError(f"{name} is not found", hint + files.near(path))
    if not path.is_dir() or not is_converted(path):
        return False
    if command in REFUSED:
        raise _refusal(f"{name}, a converted model", command)
    folder = Folder(path)
    if wished and folder.calibration is None:
        raise SpqtError(f"{path} has no thresholds for SPQT_SPARSITY={wished}", f"spqt calibrate {path}")
    if command in WRITING:
        calibrated = folder.calibration.sparsity if folder.calibration else 0.0
        print(f"spqt: {path}: {_mode(calibrated, wished)}", file=sys.stderr, flush=True)
    return True


def _refusal(what: str, command: str) -> UnsupportedError:
    reason, hint = REFUSED[command]
    return UnsupportedError(f"mlx-lm's {command} can't take {what}: {reason}", hint)


def _models(arguments: Sequence[str]) -> list[str]:
    return _named(arguments, [flag for flag in MODEL_FLAGS if flag != "-m" or arguments[0] in SHORT_M])


def _named(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The values of flags on a command line."""
    found = []
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in flags:
            found.append(value if value else (arguments[at + 1 : at + 2] or [""])[0])
    return [name for name in found if name]
