"""Rounds of Algorithm 1 where every node keeps what its clients have of their own, and sends what the method sends."""
