"""The bundle format, with its files, its manifest, and what a bundle says about itself."""
