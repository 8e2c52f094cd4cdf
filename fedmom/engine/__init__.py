"""K clients at once on one device, by the fastest way that is right."""
