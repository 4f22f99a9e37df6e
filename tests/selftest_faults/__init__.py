"""Faults in bundles whose hashes are right: is each found, and its place named? `make fault-catalogue`."""
