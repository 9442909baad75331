"""``python -m resfast.export`` is a command, ``resfast.export(…)`` a function."""

import sys

if __name__ == "__main__":
    from resfast.cli.export import main

    sys.exit(main())
else:
    from resfast.cli.common import make_callable

    make_callable(__name__, "resfast.inference.export", "export")
