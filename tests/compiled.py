"""Programs and libraries that tests compile, reused until their sources or commands change."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
cuda_build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cuda_build)


def compile_once(
    name: str, command: Sequence[str], sources: Sequence[Path], headers: Sequence[Path] = ()
) -> Path:
    """Runs ``command -o OUTPUT``, unless an earlier call has compiled the same.

    Args:
        name: file name of the output.
        command: the compiler, options and sources.
        sources: the files that are compiled; their own includes are followed.
        headers: files included from other folders.

    Returns:
        The output, in a folder of the current user that outlives the session.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True)
    parts = [torch.__version__, version.stdout, *command]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in (*sources, *sorted(headers)):
        for path, content in sorted(cuda_build.read_with_includes(file).items()):
            digest.update(path.name.encode() + b"\0" + content + b"\0")
    folder = Path(tempfile.gettempdir()) / f"resfast-{os.getuid()}" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    output = folder / name
    if not output.exists():
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            built = Path(unfinished) / name
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            built.rename(output)
    return output
