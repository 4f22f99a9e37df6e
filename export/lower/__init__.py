"""Canonical graphs rewritten into what one back end runs best."""
