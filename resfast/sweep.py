"""``python -m resfast.sweep``: searches for good values of options."""

import sys

if __name__ == "__main__":
    from resfast.cli.sweep import main

    sys.exit(main())
