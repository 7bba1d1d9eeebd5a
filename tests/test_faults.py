"""Every row of the fault catalogue has a test named after its number."""

import re
from pathlib import Path

ROWS = range(1, 77)


def test_every_row_has_a_test():
    folder = Path(__file__).parent
    text = "".join(path.read_text() for path in folder.rglob("test_*.py"))
    named = {int(number) for number in re.findall(r"def test_fault_(\d\d)_", text)}
    missing = set(ROWS) - named
    assert not missing, f"rows without a test: {sorted(missing)}"
