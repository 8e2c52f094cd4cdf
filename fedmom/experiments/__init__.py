"""What a user starts: a simulation under Flower, a sweep of runs, a benchmark."""
