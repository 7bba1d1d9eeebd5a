"""Calibration of models larger than memory, one block at a time."""
