"""Precision recipes and everything else that makes weights and activations smaller."""
