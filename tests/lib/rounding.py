"""How far a product may be from its definition, as a part of its norm."""

from spqt_cli.backends import cpu

FLOAT = 1e-5  # float32 sums of a few thousand terms: 24 bits, errors of both signs
INTEGER = 5e-5  # inputs in 16 bits of the largest of 64 (cpu/dot.h): 3 / 2^15 / sqrt(12) is 2.6e-5


def of_product(bits: int) -> float:
    """For one row, or a few in a decode step, with the instruction set that is in use."""
    usable, _ = cpu.status()
    return INTEGER if usable and bits == 4 and cpu._native().isa() == "avx512vnni" else FLOAT
