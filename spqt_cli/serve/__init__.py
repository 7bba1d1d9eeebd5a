"""`spqt serve`: mlx-lm's server behind a door that checks what comes in."""
