"""The canonical graphs, and what they cost."""
