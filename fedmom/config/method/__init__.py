"""What several keys of [algorithm] decide together: the states' policies and periods, the outer step, named presets."""
