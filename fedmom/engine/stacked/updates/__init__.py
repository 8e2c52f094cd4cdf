"""The optimizers' steps of K stacked clients, in few passes."""
