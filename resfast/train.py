"""``python -m resfast.train`` is a command, ``resfast.train(…)`` a function."""

import sys

if __name__ == "__main__":
    from resfast.cli.train import main

    sys.exit(main())
else:
    from resfast.cli.common import make_callable

    make_callable(__name__, "resfast.training.seeds", "train")
