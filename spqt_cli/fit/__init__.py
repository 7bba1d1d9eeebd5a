"""Weights fitted to the inputs that they will see, beyond rounding."""
