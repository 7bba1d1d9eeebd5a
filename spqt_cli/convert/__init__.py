"""`spqt convert`: a checkpoint of any supported form into a Zigzag folder, one tensor at a time."""
