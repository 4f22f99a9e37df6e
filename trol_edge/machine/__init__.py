"""Tells what machine this is, what the table says that it can do, and what its sensors read."""
