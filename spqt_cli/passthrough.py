"""`spqt mlx-lm ...`: mlx-lm's own command line on converted models."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spqt_cli.errors import SpqtError, UsageError

# Flags of mlx-lm's commands that name a model to load.
MODEL_FLAGS = ("--model", "--draft-model")
WRITING = ("generate", "chat", "server", "benchmark", "evaluate")  # commands that generate tokens


def run(arguments: Sequence[str]) -> None:
    """Patch mlx-lm, check the models that the command names, hand over.

    Raises SpqtError for a damaged or edited converted folder, and for what mlx-lm raises: that is its own.
    """
    if not arguments:
        raise UsageError(
            "which mlx-lm command?", "spqt mlx-lm server --model DIR; spqt mlx-lm --help lists them"
        )
    from spqt_cli import format, identity, patch

    wished = patch.wished_sparsity()
    for path in _models(arguments):
        if path.is_dir() and "spqt" in format.read_config(path):
            config = identity.check_model(path)
            if wished and "calibration" not in config["spqt"]:
                raise SpqtError(
                    f"{path} has no thresholds for SPQT_SPARSITY={wished}", f"spqt calibrate {path}"
                )
            if arguments[0] in WRITING:
                print(f"spqt: {path}: {_mode(config, wished)}", file=sys.stderr, flush=True)
    patch.install()
    if arguments[0] == "evaluate":
        from spqt_cli import lm_evaluate

        lm_evaluate.prepare()
    sys.argv = ["mlx_lm", *arguments]
    from mlx_lm import cli

    try:
        cli.main()
    except (SpqtError, MemoryError, BrokenPipeError, EOFError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise SpqtError(
            f"mlx-lm's own command failed: {type(error).__name__}: {said}",
            "spqt mlx-lm COMMAND --help lists its options; spqt --debug mlx-lm ... shows the traceback",
        ) from error


def _mode(config: dict[str, Any], wished: float | None) -> str:
    """How requests to a model run, for people."""
    calibrated: float = (config["spqt"].get("calibration") or {}).get("sparsity") or 0.0
    share = calibrated if wished is None else wished
    if not share:
        return "all runs dense, nothing is skipped"
    return f"prompts run dense, generated tokens at {share:.0%} sparsity, in batches too"


def _models(arguments: Sequence[str]) -> list[Path]:
    found = []
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in MODEL_FLAGS:
            found.append(Path(value if value else (arguments[at + 1 : at + 2] or [""])[0]))
    return [path for path in found if str(path) != "."]
