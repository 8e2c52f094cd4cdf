"""Named methods that change the gradient or the average: a page each, after its paper."""
