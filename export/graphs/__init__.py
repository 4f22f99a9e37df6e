"""Traces the canonical graphs and counts what they cost."""
