"""``python -m resfast.predict`` is a command, ``resfast.predict(…)`` a function."""

import sys

if __name__ == "__main__":
    from resfast.cli.predict import main

    sys.exit(main())
else:
    from resfast.cli.common import make_callable

    make_callable(__name__, "resfast.inference.predict", "predict")
