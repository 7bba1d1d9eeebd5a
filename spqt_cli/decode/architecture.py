"""mlx-lm's classes of an architecture, as a config.json names it."""

import re
from typing import Any

from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.system import sandbox

MODEL_TYPE = re.compile(r"\w[\w-]*")


def classes(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """mlx-lm's Model and ModelArgs for a config."""
    import mlx_lm.utils

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise SpqtError(f"{where}: config.json has no model_type", "give a model folder in the hub's form")
    unsupported = UnsupportedError(
        f"{where}: architecture {model_type!r} is not one that mlx-lm has", "see mlx-lm's list of models"
    )
    if not MODEL_TYPE.fullmatch(model_type):
        raise unsupported
    try:
        with sandbox.no_exit(f"{where}: mlx-lm's {model_type}"):
            return mlx_lm.utils._get_classes(config)
    except (ValueError, AttributeError, TypeError) as error:
        package = getattr(error.__cause__, "name", None)  # of an ImportError, which mlx-lm hides
        if package and not package.startswith("mlx_lm"):
            raise UnsupportedError(
                f"{where}: mlx-lm's {model_type} needs the package {package}", "install it"
            ) from None
        raise unsupported from None
