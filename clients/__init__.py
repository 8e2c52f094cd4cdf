"""Flower's client side: client_app.py."""
