"""The larger sections of a configuration, and what one key is."""
