"""`spqt eval` and `spqt compare`: what sparsity costs in quality."""
