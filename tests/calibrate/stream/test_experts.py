"""A mixture of experts block by block: the thresholds and gradients of the whole model.

mlx-lm sorts the rows of a window by expert; which position each belongs to must still be known.
"""

import shutil

import pytest

from spqt_cli.convert import convert
from tests.calibrate.stream import test_engine
from tests.lib.mixture import tiny_mixture


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    base = tmp_path_factory.mktemp("experts")
    source = tiny_mixture(base / "source", num_hidden_layers=3)
    convert.convert(str(source), base / "model", convert.ConvertOptions(bits=4, group_size=32))
    return base / "model"


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def test_same_thresholds_as_with_the_whole_model(folder, tmp_path):
    test_engine.test_same_thresholds_as_with_the_whole_model(folder, tmp_path, "uniform")


def test_gradients_block_by_block_are_those_of_the_whole_model(folder):
    test_engine.test_gradients_block_by_block_are_those_of_the_whole_model(folder)
