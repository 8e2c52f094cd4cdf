"""The commands of the first minutes."""
