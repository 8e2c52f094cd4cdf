"""One run under way, and who hears of it."""
