"""Runs Metal kernel bodies on the CPU and judges every memory access; see emulator.py."""

from .emulator import Emulation, clang_text, emulate, metal_text

__all__ = ["Emulation", "clang_text", "emulate", "metal_text"]
