"""``python -m resfast.data``: a picture of what augmentation does, and image folders as shards."""

import sys

if __name__ == "__main__":
    from resfast.cli.data import main

    sys.exit(main())
