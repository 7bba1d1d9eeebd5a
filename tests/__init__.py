"""The project's tests; README.md says what runs where."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
