"""Who runs a round: this process, workers on Ray, or peers that exchange rows."""
