"""Where nodes keep what their clients have of their own: what then travels in a round, and what a node makes of it."""
