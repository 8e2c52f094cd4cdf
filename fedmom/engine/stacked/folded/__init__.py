"""A model for the examples of K clients in one batch: layers that know of clients, and how they come into its copy."""
