"""From a question to an answer: reading it, taking turns, choosing tokens, giving pieces out."""
