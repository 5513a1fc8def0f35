"""`python -m examples.packaged NAME...`: prepare models, data and tasks; print their paths.

Without a name, list what there is.
"""

import argparse
import sys
from pathlib import Path

from . import NAMES, default_cache, prepare


def main() -> int:
    """Read the command line, and prepare."""
    width = max(map(len, NAMES))
    parser = argparse.ArgumentParser(
        prog="python -m examples.packaged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="names:\n" + "\n".join(f"  {name:<{width}}  {NAMES[name]}" for name in NAMES),
    )
    parser.add_argument("name", nargs="+", choices=NAMES, metavar="NAME", help="listed below")
    into = f"keeps what is prepared (default: {default_cache()})"
    parser.add_argument("--into", type=Path, metavar="DIR", help=into)
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    options = parser.parse_args()
    try:
        for name in options.name:
            print(prepare(name, options.into))
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
