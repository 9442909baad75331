"""``python -m resfast.doctor``: what of this machine resfast can use, a line each."""

import sys

if __name__ == "__main__":
    from resfast.cli.doctor.main import main

    sys.exit(main())
