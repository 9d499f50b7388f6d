"""`python -m ovam_core`: the same program as the command `ovam`."""

import sys

from ovam_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
