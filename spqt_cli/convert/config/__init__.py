"""What a checkpoint's config.json means, and its keys as mlx-lm's classes read them."""
