"""Plants faults in bundles and prints which were found: python -m tests.selftest_faults.

It exports both small models in every precision for a CPU and for the stand-in for a GPU, runs them unharmed in all ways
in which healthy machines may differ, plants every fault of the catalogue, prints the tables, and with --page writes
them as a page. The exit code is 1 if a fault was missed or misnamed, or an unharmed run failed.

With --clean FOLDER it makes only the unharmed runs, of the bundles in a folder, with what is installed here: another
onnxruntime, for example. That needs no export.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.selftest_faults import campaign


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.selftest_faults")
    parser.add_argument("--every", type=int, default=1, help="plant every n-th fault of each kind only")
    parser.add_argument("--precision", action="append", choices=campaign.PRECISIONS)
    parser.add_argument("--times", type=int, default=5, help="unharmed runs of each variant")
    parser.add_argument("--keep", action="store_true", help="use the bundles of the last run")
    parser.add_argument("--clean", type=Path, help="folder of bundles: only unharmed runs")
    parser.add_argument("--oldest", type=Path, help="folder with another onnxruntime, for more unharmed runs")
    parser.add_argument("--page", type=Path, help="file for the tables")
    given = parser.parse_args()
    if given.clean:
        return campaign.only_clean(given.clean, given.times)
    precisions = given.precision or campaign.PRECISIONS
    return campaign.campaign(precisions, given.every, given.times, given.keep, given.oldest, given.page)


if __name__ == "__main__":
    sys.exit(main())
