"""Hostile trials by the thousand: every one ends in an answer as it should be or in a TrolEdgeError.

A campaign makes trials of one kind from seeds. They run in child processes, so that a crash, a hang or too much memory
is seen and named: python -m tests.fuzz --help.
"""
