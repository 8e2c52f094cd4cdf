"""A client's objective f_i: its minibatches, its gradient, and how a model is judged."""
