"""Two thousand damaged models: refused or accepted, never a crash. More of them: `make torture`."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from spqt_cli.errors import SpqtError
from spqt_cli.format import checkpoint_files
from tests.lib.hostile import attempt, prepare

CASES, BLOCKS = 2000, 8


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_damaged_models(block: int, sound: dict[str, Path], tmp_path: Path) -> None:
    outcomes = set()
    for seed in range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS):
        try:
            outcomes.add(attempt(seed, sound, tmp_path))
        except Exception as error:
            raise AssertionError(f"seed {seed} broke the promise") from error
    # the damage must be such that some cases pass and some fail
    assert {"accepted", "refused with exit 3", "refused with exit 4"} <= outcomes


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "F64", "F8_E4M3", "I64", "X"]),
        "shape": st.lists(st.integers(-1, 1 << 64) | st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2),
    }
)
HEADERS = st.dictionaries(st.text(max_size=8), ENTRIES | st.none() | st.integers() | st.text(), max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(header=HEADERS, size=st.integers(0, 64))
def test_headers_of_any_kind(
    header: dict[str, object], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    try:
        tensors, _ = checkpoint_files.read_shard(path, path.name)
    except SpqtError:
        return
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(tensors)
    assert sum(tensor.nbytes for tensor in tensors.values()) == size
