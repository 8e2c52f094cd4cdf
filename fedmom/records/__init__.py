"""A run's folder: how it is written, read, followed and recognised."""
