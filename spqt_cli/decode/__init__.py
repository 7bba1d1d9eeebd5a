"""A converted model that runs: layers, fused blocks, hooks into mlx-lm, loading and generating."""
