"""The local optimizers: each a page that reads like its paper, written for one tensor of one client."""
