"""Clients that are given with the data or by the user's own rule, rather than drawn by one of ours."""
