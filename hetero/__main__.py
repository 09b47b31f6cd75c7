"""`python -m hetero`."""

from __future__ import annotations

import sys

from hetero.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
