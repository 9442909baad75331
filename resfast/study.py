"""``python -m resfast.study``: trains the variants of a study and says which of them differ."""

import sys

if __name__ == "__main__":
    from resfast.cli.study import main

    sys.exit(main())
