"""`python -m spearrl`."""

from __future__ import annotations

import sys

from spearrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
