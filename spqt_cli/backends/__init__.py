"""One interface, several ways to multiply: the GPU kernels, the CPU extension, MLX's own matmul."""
