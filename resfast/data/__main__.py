"""``python -m resfast.data``: the same as ``resfast data``."""

import sys

if __name__ == "__main__":
    from resfast.cli.data import main

    sys.exit(main())
