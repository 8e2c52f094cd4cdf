"""What becomes of every state between rounds: who averages it, and how often."""
