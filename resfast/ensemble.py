"""``python -m resfast.ensemble`` is a command, ``resfast.ensemble(…)`` a function."""

import sys

if __name__ == "__main__":
    from resfast.cli.ensemble import main

    sys.exit(main())
else:
    from resfast.cli.common import make_callable

    make_callable(__name__, "resfast.inference.ensemble", "ensemble")
