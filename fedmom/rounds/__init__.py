"""What a round asks, what comes of it, and R of them."""
