"""Real clients in containers: keys and certificates, Compose files, and a run that is followed to its end."""
