"""python -m brc_fast: the command line."""

import sys

from .command.main import main

if __name__ == "__main__":
    sys.exit(main())
