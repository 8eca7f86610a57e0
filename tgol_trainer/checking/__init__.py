"""Check a dataset before a model is loaded: bad rows, duplicates, long prompts, sizes."""
