"""Example programs: `python -m trol_edge.examples.camera`, `.asyncio_loop`, `.ros2_node`. Each shows `--help`."""
