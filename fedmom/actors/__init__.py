"""A pool of supervised Ray actors that answer messages; nothing of learning."""
