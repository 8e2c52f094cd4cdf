"""Examples, who holds which of them, and minibatches."""
