"""Runs the command line by `python -m trol_edge`."""

import sys

from trol_edge.cli.main import main

sys.exit(main())
