#!/usr/bin/env bash
# safetensors 0.8.0 writes the entries of a file's metadata in another order each time, in one process too:
# the same tensors and the same metadata are other bytes, so that hashes of files, caches and reproducible
# builds see a change where there is none. Tensors are in a fixed order; with one entry the bytes are equal.
#
# Seen on 2026-11-30: more than one content in 20 calls with eight entries, exactly one without metadata.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.6
venv/bin/python - <<'END'
import numpy as np
from safetensors.numpy import save

tensors = {name: np.full(2, ord(name), np.float32) for name in "abcdef"}
several = {save(tensors, {name: "value" for name in "abcdefgh"}) for _ in range(20)}
one = {save(tensors, {"a": "value"}) for _ in range(20)}
none = {save(tensors) for _ in range(20)}
print(len(several), len(one), len(none))
assert len(several) > 1 and len(one) == len(none) == 1
END
