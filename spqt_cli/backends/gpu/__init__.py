"""The Metal and CUDA backend: one kernel source, each variant checked before its first use."""
