"""``python -m hesscli`` is the same as ``hesscli``."""

from __future__ import annotations

import sys

from hesscli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
