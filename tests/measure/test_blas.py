"""The threads of numpy's BLAS are counted and limited."""

import os
import subprocess
import sys

import pytest

from spqt_cli.measure import blas

CODE = """
from spqt_cli.measure import blas
before = blas.threads()
with blas.limited(1):
    within = blas.threads()
print(before, within, blas.threads())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.skipif(not blas._controller().lib_controllers, reason="this BLAS can't be asked")
def test_a_limit_lasts_for_its_block():
    command = [sys.executable, "-c", CODE]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["2", "1", "2"]


def test_a_library_that_cannot_be_asked(monkeypatch):
    monkeypatch.setattr(blas._controller(), "lib_controllers", [])
    assert blas.threads() == 1
    with blas.limited(1):
        pass
