from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import re, torch
from resfast import runtime

def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

assert runtime.tune_allocator()
kept = []
for _ in range(8):
    big = torch.ones(16 << 20, dtype=torch.uint8)
    kept.append((big, torch.ones(1000)))
before = resident_mib()
kept = [small for _, small in kept]  # between the big ones
del big
freed = before - resident_mib()
runtime.release_memory(torch.device("cpu"))
print(freed, before - resident_mib())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, needs glibc")
def test_a_tuned_allocator_keeps_memory_until_it_is_released():
    out = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    ).stdout
    kept, released = map(float, out.split())
    assert kept < 16
    assert released > 100
