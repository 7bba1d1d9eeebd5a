"""Presets and the shipped calibration text, read as package data."""
