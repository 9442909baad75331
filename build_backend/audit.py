"""Checks a wheel with C++ kernels, and tags it as what it is: ``python audit.py FILE.whl``.

It has to load in every Python from 3.11 on (abi3audit) and on every Linux with glibc 2.28 or newer
(auditwheel), and to need no libraries but those and torch's. The tag of the platform, which pip
writes for the machine of the build, becomes manylinux_2_28. Needs the packages of the extra
``wheel``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

GLIBC = (2, 28)
"""That of manylinux_2_28, the oldest that torch's own wheels run on."""
OF_TORCH = {"libtorch_cpu.so", "libtorch_cuda.so"}
"""Libraries that are loaded with torch, and that no policy knows."""


def of_cuda(name: str) -> bool:
    """Whether a library is CUDA's runtime, which torch has loaded too."""
    return re.fullmatch(r"libcudart\.so\.\d+", name) is not None


def faults(report: dict[str, Any]) -> list[str]:
    """What keeps a wheel from the tag manylinux_2_28, of ``auditwheel show --json``."""
    found = []
    others = {name for name in report["external_libs"] if not of_cuda(name)} - OF_TORCH
    if others:
        found.append(f"it needs {', '.join(sorted(others))}, which no Linux is sure to have")
    needed = re.match(r"manylinux_(\d+)_(\d+)_", str(report["sym_tag"]))
    if needed is None:
        found.append(f"its symbols are those of no known Linux ({report['sym_tag']})")
    elif (int(needed[1]), int(needed[2])) > GLIBC:
        newer = [name for names in report["versioned_symbols"].values() for name in names]
        found.append(
            f"its symbols need glibc {needed[1]}.{needed[2]} ({', '.join(sorted(newer))}); "
            "csrc/cpu/common/portable.cpp is the place to define those that are too new"
        )
    return found


def main(wheel: Path) -> int:
    """Prints what was found and renames the wheel; the exit code is 1 if it is not portable."""
    python = [sys.executable, "-m"]
    shown = subprocess.run([*python, "auditwheel", "show", "--json", str(wheel)], stdout=-1)
    if shown.returncode:
        return 1
    report = json.loads(shown.stdout)
    for fault in (found := faults(report)):
        print(f"{wheel.name} is not for manylinux_2_28: {fault}", file=sys.stderr)
    if found or subprocess.run([*python, "abi3audit", "--strict", str(wheel)]).returncode:
        return 1
    machine = str(report["sym_tag"]).split("_", 3)[3]
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
    retag = [*python, "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel)]
    done = subprocess.run(retag, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        print(f"{wheel.parent / done.stdout.strip()}: symbols of {report['sym_tag']}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
