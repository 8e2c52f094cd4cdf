"""Sweeps from Python, and searches that choose their runs as they go."""
