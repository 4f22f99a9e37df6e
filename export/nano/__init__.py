"""Data, training and report of the small models that ship with the repository."""
