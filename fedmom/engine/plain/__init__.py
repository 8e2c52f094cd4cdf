"""Plain torch, one client after another: what every way of running clients is held to."""
