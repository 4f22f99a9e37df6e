"""Checks whether a bundle computes the reference's numbers on this machine."""
