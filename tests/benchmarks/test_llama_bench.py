"""llama.cpp as the peer of decode benchmarks: its model, how it is asked, and what is made of its rates.

Contract: the GGUF holds what llama.cpp wants of such a model, all matrices in Q4_0, and its weights neither
grow nor shrink x; the peer takes its turn in every repetition; ours is held against the faster of the two.
"""

import dataclasses

import numpy as np
import pytest

from spqt_cli.bench import bench, model_timing
from spqt_cli.convert.gguf import file, names
from tests.bench.test_bench import tiny_subject
from tests.conftest import tiny_config

gguf = pytest.importorskip("gguf")
decode = pytest.importorskip("benchmarks.decode", reason="benchmarks/ is not part of a source archive")
llama_bench = pytest.importorskip("benchmarks.peer.llama_bench")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_file_holds_all_tensors_of_such_a_model(tmp_path, arch):
    config = tiny_config(arch)
    path = tmp_path / "random.gguf"
    llama_bench.write(config, path)
    found = names.origins(file.read_header(path), arch, config)  # none missing, none left over
    stored = {one.name: one for one in gguf.GGUFReader(path).tensors}
    for name, origin in found.items():
        tensor = stored[origin.stored]
        assert tuple(tensor.shape[::-1]) == origin.shape, name
        if len(origin.shape) == 2:
            assert tensor.tensor_type.name == "Q4_0"
            w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            size = np.linalg.norm(w @ np.random.default_rng(1).normal(size=w.shape[1])) / w.shape[0] ** 0.5
            assert 0.5 < size < 2.0  # an x of ones in size comes out as one
    assert not list(tmp_path.glob("*.unfinished"))


def test_other_architectures_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="gemma3_text"):
        llama_bench.write(tiny_config("gemma3"), tmp_path / "random.gguf")


def test_a_test_as_llama_bench_takes_it():
    Test = model_timing.Test
    assert llama_bench.arguments(Test("decode", 64, 8192)) == ["-p", "0", "-n", "64", "-d", "8192"]
    assert llama_bench.arguments(Test("prompt", 512, 0)) == ["-p", "512", "-n", "0", "-d", "0"]


class Other:
    """A peer whose rates are known."""

    name, note, weight_bytes = "llama.cpp", "a note of the peer", 1000

    def __init__(self, rates):
        self.rates, self.asked = iter(rates), []

    def rate(self, test):
        self.asked.append(test)
        return next(self.rates)


def test_a_peer_takes_its_turn_in_every_repetition(monkeypatch):
    monkeypatch.setattr(model_timing, "_decode_rate", lambda *_: 100.0)
    peer = Other([1.0, 200.0, 50.0])  # the first repetition warms up
    runs = model_timing.Runs(tiny_subject(), [], model_timing.hardware.Energy(), 1e9, [peer])
    row = runs.run(model_timing.Test("decode", 4, 0), 2, lambda *_: None)[-1]
    assert row.variant == "llama.cpp"
    assert row.rate.samples == [200.0, 50.0]
    assert row.speedup.samples == [2.0, 0.5]
    assert row.bandwidth == 1000 * 125.0
    assert len(peer.asked) == 3
    assert len(row.host_us) == 2


def rows(rates):
    """A row of a decode test by (variant, sparsity): rates."""
    first = model_timing.ModelRow(
        "tg64", 0, "", None, None, None, None, None, None, None, 0.0, None, []
    )  # fmt: skip
    return [
        dataclasses.replace(first, variant=name, sparsity=sparsity, rate=bench.model_timing.Stat(samples))
        for (name, sparsity), samples in rates.items()
    ]


def test_ours_is_held_against_the_better_peer():
    found = {
        ("stock", None): [10.0, 10.0, 10.0],
        ("zigzag dense", 0.0): [20.0, 30.0, 25.0],
        ("llama.cpp", None): [20.0, 20.0, 50.0],
    }
    report = bench.Report({}, {}, rows(found))
    *_, line = decode.against_better_peer(report).splitlines()
    assert line == "| tg64 @ d0 | zigzag dense | llama.cpp | 1.00 (0.50-1.50) |"
    del found["llama.cpp", None]
    assert decode.against_better_peer(bench.Report({}, {}, rows(found))) == ""
