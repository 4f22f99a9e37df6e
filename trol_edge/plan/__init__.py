"""Predicts the time and memory that a bundle would take on a device, from counts and rates."""
