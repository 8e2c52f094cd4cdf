"""The keys of a configuration, and what becomes of them."""
