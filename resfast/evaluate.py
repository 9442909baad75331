"""``python -m resfast.evaluate`` is a command, ``resfast.evaluate(…)`` a function."""

import sys

if __name__ == "__main__":
    from resfast.cli.evaluate import main

    sys.exit(main())
else:
    from resfast.cli.common import make_callable

    make_callable(__name__, "resfast.inference.evaluate", "evaluate")
