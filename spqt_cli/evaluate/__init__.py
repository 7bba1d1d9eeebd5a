"""Measures what quantization and sparsity cost in quality: `spqt eval` and `spqt compare`."""
