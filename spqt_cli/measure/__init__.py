"""What calibration, evaluation and benchmarks share: probes, scores, texts, many rows."""
