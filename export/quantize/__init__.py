"""Precision recipes, and everything that makes weights and activations smaller."""
