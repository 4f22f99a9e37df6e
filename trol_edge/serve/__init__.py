"""The HTTP server of `trol-edge serve`. Nothing in here is imported by `import trol_edge`."""
