"""Warns where a calibration measured that the text will suffer."""

import math

from spqt_cli.format.contract import CalibrationRecord

# KL to the dense model, in nats on held-out text, above which a user is warned. On SmolLM2-135M a sparsity of
# 25 % cost 0.034 (perplexity +2.7 %), 40 % 0.14 (+13 %), 50 % 0.31 (+34 %): KL is about the logarithm of the
# rise. At 0.1 perplexity is up by a tenth, between what reads well there and what does not (docs/quality.md).
SUFFERS = 0.1
UNSEEN = 0.01  # below it perplexity is up by less than a hundredth


def judged(kl: float) -> str:
    """What a KL to the dense model, in nats on held-out text, means for the text, in a few words."""
    rise = f"perplexity about {math.expm1(min(max(kl, 0.0), 10)):+.0%}"
    if kl < UNSEEN:
        return f"no difference to be seen, {rise}"
    return f"the text reads about as well, {rise}" if kl <= SUFFERS else f"the text suffers, {rise}"


def warning(kl: float) -> str:
    """One line where a KL to the dense model, in nats on held-out text, means worse text; else ""."""
    if kl <= SUFFERS:
        return ""
    return (
        f"warning: the text will suffer: KL to dense {kl:.2f} on held-out text, perplexity about "
        f"{math.expm1(min(kl, 10)):+.0%}; a lower --sparsity, or --max-kl {SUFFERS:g}, keeps more"
    )


def warning_of(calibration: CalibrationRecord | None, sparsity: float | None) -> str:
    """The warning for a model that runs at a sparsity: the calibrated one, or more; else ""."""
    if calibration is None or calibration.kl is None or sparsity is None or sparsity < calibration.sparsity:
        return ""
    said = warning(calibration.kl)
    if not said or sparsity == calibration.sparsity:
        return said
    return (
        f"warning: the text will suffer: KL to dense is {calibration.kl:.2f} at the calibrated "
        f"{calibration.sparsity:.0%}, and more at {sparsity:.0%}; spqt compare measures it"
    )
