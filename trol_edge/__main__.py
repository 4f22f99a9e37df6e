"""`python -m trol_edge`."""

import sys

from trol_edge.cli import main

sys.exit(main())
