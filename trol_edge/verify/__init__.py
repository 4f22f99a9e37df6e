"""Whether the numbers of a bundle are the reference's, on this machine."""
