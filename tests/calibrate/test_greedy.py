"""The block-wise greedy search: sparsities, order, and that it beats uniform at its own game."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.calibrate import greedy
from spqt_cli.decode import session
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import probes


@pytest.fixture(scope="module")
def searched(converted):
    loaded = session.load(converted, dense=True)
    tokens = np.random.default_rng(0).integers(5, 500, 64).astype(np.int32)
    with probes.probing(loaded.model) as harness:
        with harness.counting() as counts:
            probes.prompt_cache(loaded.model, mx.array(tokens[None]))
        before = {type(block): type(block).__call__ for block in loaded.model.layers}
        found = greedy.sparsities(loaded.model, harness, tokens, counts, lambda *_: None)
        assert all(kind.__call__ is call for kind, call in before.items())
        errors = {
            name: block_error(loaded, harness, tokens, values) for name, values in choices(found, counts)
        }
        sizes = {path: layer.inputs * layer.outputs for path, layer in harness.layers.items()}
    return found, sizes, errors


def choices(found, counts):
    at = CURVE_SPARSITIES.index(0.5)
    for name, shares in (
        ("greedy", {p: v[at] for p, v in found.items()}),
        ("uniform", dict.fromkeys(found, 0.5)),
    ):
        yield name, {p: float(thresholds.quantile(counts[p], [share])[0]) for p, share in shares.items()}


def block_error(loaded, harness, tokens, values) -> float:
    """Squared error of the first block's output."""
    hidden = loaded.model.model.embed_tokens(mx.array(tokens[None]))
    block = loaded.model.layers[0]
    dense = block(hidden, "causal", None)
    with harness.masked(probes.Masking(values)):
        masked = block(hidden, "causal", None)
    return mx.square(dense - masked).sum().item()


def test_every_block_meets_every_total(searched):
    found, sizes, _ = searched
    for block in ("model.layers.0.", "model.layers.1."):
        paths = [path for path in found if path.startswith(block)]
        assert len(paths) == 7
        for at, total in enumerate(CURVE_SPARSITIES):
            skipped = sum(found[path][at] * sizes[path] for path in paths)
            assert skipped / sum(sizes[path] for path in paths) == pytest.approx(total, abs=1e-9)
    assert all((np.diff(rising) >= -1e-12).all() for rising in found.values())


def test_block_error_is_below_uniform(searched):
    _, _, errors = searched
    assert errors["greedy"] < 0.95 * errors["uniform"]


def test_layers_outside_blocks_are_refused(converted):
    loaded = session.load(converted, dense=True)
    with pytest.raises(UnsupportedError, match="in no block"):
        greedy.blocks_of(loaded.model, ["lm_head"])


def test_method_paper_end_to_end(converted, tmp_path):
    import shutil

    from spqt_cli.calibrate import calibrate

    folder = shutil.copytree(converted, tmp_path / "model")
    options = calibrate.CalibrateOptions(sparsity=0.4, tokens=256, window=64, method="uniform")
    result = calibrate.calibrate(folder, dataclasses.replace(options, method="paper"), lambda *_: None)
    assert [one.name for one in result.tried] == ["paper"]
    assert result.realised == pytest.approx(0.4, abs=0.03)
    assert len({row.target for row in result.layers}) > 2
