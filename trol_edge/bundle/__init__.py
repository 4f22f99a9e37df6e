"""The bundle format: its files, its manifest, and what a bundle says about itself."""
