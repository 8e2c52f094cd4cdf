"""A project that `fedmom new` writes: the files as they are, and who writes them."""
