"""The small models that ship with the repository: their data, their training, their report."""
