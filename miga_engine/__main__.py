"""`python -m miga_engine` is the `miga` command."""

import sys

from miga_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
