"""Measuring a bundle: its stages, memory and energy, a page about them, and a soak test."""
