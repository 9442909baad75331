"""The C++ kernels; everything else about the package stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

import resfast_build

setup(ext_modules=resfast_build.extensions(), cmdclass={"build_ext": resfast_build.BuildExt})
