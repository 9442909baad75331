"""``python -m resfast.report``: writes one HTML page about runs."""

import sys

if __name__ == "__main__":
    from resfast.cli.report import main

    sys.exit(main())
