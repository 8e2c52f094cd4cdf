"""Flower's server side: strategies and server_app.py."""
