"""The Zigzag layout and the folder on disk: what is written, checked and identified. Runs no model."""
