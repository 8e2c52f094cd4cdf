"""This process and its machine: memory, cores, precision, scratch folders, what is printed."""
