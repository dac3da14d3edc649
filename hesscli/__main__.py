"""``python -m hesscli`` is the same as ``hesscli``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder, whose matplotlib.py is not meant

    from hesscli.cli.app import main

    sys.exit(main())
