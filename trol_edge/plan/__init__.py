"""What a bundle would take on a device: time and memory, from counts and rates."""
