#!/usr/bin/env bash
# torch 2.11.0's mkldnn::_convolution_pointwise, which Inductor calls on the CPU, cannot add a residual
# of one pixel per map in channels_last: "could not create a memory". 2.15.0 can.
#
# Seen on 2026-11-30 with 2.11.0, and not with 2.15.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet torch==2.11.0 numpy==2.4.6
venv/bin/python - <<'END2'
import torch


def of(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def add(x, residual):
    weight, ones = torch.randn(24, 24, 3, 3), [1, 1]
    call = torch.ops.mkldnn._convolution_pointwise.binary
    return call(x, residual, weight, None, [0, 0], ones, ones, 1, "add", 1.0, None, [], "")


add(of(3, 24, 4, 4), of(3, 24, 2, 2))
try:
    add(of(3, 24, 3, 3), of(3, 24, 1, 1))
except RuntimeError as error:
    print(error)
    assert "could not create a memory" in str(error)
else:
    raise SystemExit("one pixel is added now")
END2
