"""The C++ kernels; everything else about the package stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

import resfast_build

extensions = resfast_build.extensions()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": resfast_build.BuildExt},
    # The kernels do not use Python at all: one wheel is for all its versions.
    options={"bdist_wheel": {"py_limited_api": resfast_build.OLDEST_PYTHON}} if extensions else {},
)
