"""Turns text and pictures into the token ids and pixels that the graphs take."""
