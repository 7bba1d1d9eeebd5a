"""Every row of the fault catalogue has a test named after its number."""

import re
from pathlib import Path

ROWS = range(1, 77)
# Rows that wait for a server of our own: `spqt mlx-lm server` is mlx-lm's, with mlx-lm's behaviour.
SERVER = set(range(70, 77))


def test_every_row_has_a_test():
    folder = Path(__file__).parent
    text = "".join(path.read_text() for path in folder.rglob("test_*.py"))
    named = {int(number) for number in re.findall(r"def test_fault_(\d\d)_", text)}
    missing = set(ROWS) - SERVER - named
    assert not missing, f"rows without a test: {sorted(missing)}"
    assert not named & SERVER, "a server's row has a test now: take it out of SERVER"
