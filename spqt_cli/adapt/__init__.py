"""Adapters as files: made of PEFT's, and fused into a converted folder."""
