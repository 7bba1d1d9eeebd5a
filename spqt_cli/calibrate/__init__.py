"""`spqt calibrate`: thresholds from text."""
