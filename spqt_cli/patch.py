"""Patches MLX and mlx-lm on import: `mlx_lm.load` and all that builds on it then run converted models.

This is the one module whose import changes other libraries; `spqt_cli.decode.hooks` says what is changed.
"""

from spqt_cli.decode import hooks

hooks.install()
