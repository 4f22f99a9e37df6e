"""Turns a question into an answer: reads it, takes turns, chooses tokens and yields pieces."""
