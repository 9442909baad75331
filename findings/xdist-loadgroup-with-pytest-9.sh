#!/usr/bin/env bash
# With pytest 9.2.0, pytest-xdist 3.8.0's "--dist loadgroup" no longer keeps the tests of a group on one
# worker: marked with xdist_group, they are spread as with "--dist load". Tests that share a port, a
# device or a file because they were in one group then run at the same time. With pytest 8.4.2 and the
# same pytest-xdist all tests of a group run on one worker.
#
# Seen on 2026-11-30: 8 tests of one group on 1 worker with pytest 8.4.2, on 2 with 9.2.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > test_group.py <<'END'
import os
import time

import pytest


@pytest.mark.parametrize("number", range(8))
@pytest.mark.xdist_group("one")
def test_in_a_group(number, worker_id):
    time.sleep(0.2)
    with open(os.environ["WORKERS"], "a") as file:
        file.write(worker_id + "\n")
END
count() {
  "${PYTHON:-python3}" -m venv "venv-$1"
  "venv-$1/bin/pip" install --quiet "pytest==$1" pytest-xdist==3.8.0
  WORKERS=$folder/workers-$1 "venv-$1/bin/python" -m pytest -q -n 2 --dist loadgroup test_group.py >&2
  sort -u "workers-$1" | wc -l
}
before=$(count 8.4.2)
now=$(count 9.2.0)
echo "workers of one group: $before with pytest 8.4.2, $now with pytest 9.2.0"
[ "$before" = 1 ] && [ "$now" = 2 ]
