"""`python -m tests.faults`: makes all trials of all rows and prints the table; exits 1 where a row did not hold."""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .one import in_own_process
from .row import Outcome, Row
from .table import ROWS, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("-j", type=int, default=1, help="how many rows run at once")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="which rows; default: all")
    parser.add_argument("--most", type=int, help="at most so many trials of a row, to see whether it works")
    parser.add_argument(
        "--folder", type=Path, help="where the runs are kept; default: a folder that is removed"
    )
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = settings.folder or Path(temporary)

        def run(name: str) -> tuple[Row, Outcome | str]:
            row, begun = ROWS[name], time.monotonic()
            trials = row.trials if settings.most is None else min(row.trials, settings.most)
            found = in_own_process(row, trials, folder, warm=row.warm, quiet=False)
            words = found if isinstance(found, str) else found.words
            print(f"{name}: {time.monotonic() - begun:.0f} s: {words}", flush=True)
            return row, found

        with ThreadPoolExecutor(settings.j) as pool:
            results = list(pool.map(run, settings.rows))
    print(f"\n{table(results)}")
    return int(any(isinstance(found, Outcome) and not found.held for _, found in results))


if __name__ == "__main__":
    sys.exit(main())
