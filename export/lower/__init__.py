"""Rewrites canonical graphs into what one back end runs best."""
