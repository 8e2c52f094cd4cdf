"""Algorithm 2's exchange: graphs of clients, the mixing matrices W_t, and the product with one of them."""
