"""A Flower app that trains nothing: what is left is the time of whatever carries its messages."""
