"""The command line as `python -m eacmoe_lightning`."""

import sys

from eacmoe_lightning.cli import main

if __name__ == "__main__":
    sys.argv[0] = "eacmoe"  # the name in messages and cards
    main()
