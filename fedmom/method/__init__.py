"""Algorithms 1 and 2 of Yu, Jin, Yang (ICML 2019), written for one client."""
