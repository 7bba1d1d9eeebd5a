"""Patches MLX and mlx-lm on import: `mlx_lm.load` and all that builds on it then run converted models.

This is the one module whose import changes other libraries; `spqt_cli.decode.hooks` says what is changed.
Raises ImportError with the command that installs MLX where it is missing.
"""

from spqt_cli.errors import without_mlx

try:
    from spqt_cli.decode import hooks
except ImportError as _error:
    if (_missing := without_mlx(_error)) is None:
        raise
    raise ImportError(f"{_missing.cause}: {_missing.hint}", name="mlx") from _error

hooks.install()
