"""``python -m resfast.doctor``: reports what resfast can use on this machine."""

import sys

if __name__ == "__main__":
    from resfast.cli.doctor.main import main

    sys.exit(main())
