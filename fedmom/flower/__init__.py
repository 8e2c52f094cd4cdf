"""Flower's messages, Grid and apps on our actors."""
