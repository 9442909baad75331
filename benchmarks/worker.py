"""A process that trains for a requested number of steps, and otherwise sleeps.

``python -m benchmarks.worker MODULE DEVICE BATCH_SIZE RECIPE`` calls ``benchmarks.MODULE.build``,
prints ``ready``, and then answers lines on standard input: a number of steps with the seconds they
took, ``info`` with a description of the process as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from resfast import runtime

WARM_UP_STEPS = 3


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _info(device: torch.device) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    info = {
        "peak_rss_mib": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "processor": runtime.describe(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        info["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
        info["cudnn"] = torch.backends.cudnn.version()
    return info


def main() -> None:
    # Keeps the output of libraries out of the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    name, device, batch_size = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3])
    step = importlib.import_module(f"benchmarks.{name}").build(device, batch_size, sys.argv[4])
    _timed(step, WARM_UP_STEPS, device)
    print("ready", file=answers)
    waited = waited_cpu = 0.0
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        line = sys.stdin.readline().strip()
        waited += time.perf_counter() - wall
        waited_cpu += time.process_time() - cpu
        if not line:
            return
        if line == "info":
            share = round(waited_cpu / waited, 4)
            print(json.dumps({**_info(device), "cpu_share_while_waiting": share}), file=answers)
        else:
            print(_timed(step, int(line), device), file=answers)


if __name__ == "__main__":
    main()
