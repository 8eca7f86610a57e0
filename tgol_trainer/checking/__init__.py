"""Check a dataset before training: bad rows, duplicates, long prompts, sizes. No weights are loaded."""
