"""Backends for tests: the GPU kernels where an emulator stands in for the GPU, and the definition."""

from spqt_cli.backends import stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.interface import Backend

EMULATED = Backend("cuda", "emulated", gpu, fused=gpu, count_every=8, traces=True)
DEFINITION = stock.found("the definition")
