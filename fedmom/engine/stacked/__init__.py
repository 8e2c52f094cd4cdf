"""K stacked clients through one folded model: the engine's fast ways."""
