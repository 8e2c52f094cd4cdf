"""Layers of a folded model that go through one operator together, on a CUDA device."""
