"""Programs to start from: `python -m trol_edge.examples.camera`, `.asyncio_loop`, `.ros2_node`; each shows `--help`."""
