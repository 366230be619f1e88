"""``python -m gpusched_ipy`` is ``gpusched``."""

from __future__ import annotations

import sys

from gpusched_ipy.cli import main

if __name__ == "__main__":
    sys.exit(main())
