"""Every client's own results, read from a run folder and laid out as tables."""
