"""Converting takes as much memory as the largest tensor asks for, however many layers there are."""

from pathlib import Path

import pytest


def test_fault_62_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    memory = pytest.importorskip("benchmarks.memory", reason="benchmarks/ is not part of the sdist")
    few, many = (memory.convert_row(tmp_path, 768, layers, keep=False) for layers in (2, 8))
    # six more layers are 100 MB of weights; holding a third of them would break this
    assert many["source_bytes"] - few["source_bytes"] > 90e6
    assert many["peak_bytes"] < few["peak_bytes"] + 30e6
    assert all(row["peak_bytes"] <= row["limit_bytes"] for row in (few, many))
