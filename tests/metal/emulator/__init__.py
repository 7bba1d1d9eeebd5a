"""Runs Metal kernel bodies on the CPU and judges every memory access; see emulator.py."""

from .emulator import Emulation, emulate, metal_text

__all__ = ["Emulation", "emulate", "metal_text"]
