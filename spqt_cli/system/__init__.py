"""Files that appear whole, a sandbox for templates, text that is safe on a terminal. Knows no models."""
