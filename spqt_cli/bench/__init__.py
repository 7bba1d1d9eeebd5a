"""`spqt bench`: speed beside stock MLX in the same run."""
