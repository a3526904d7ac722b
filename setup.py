"""Builds csrc/ with CMake and ninja. Everything else is in pyproject.toml.

The extension is optional: where it cannot be built, the package installs without it, and
fastcl says once, at first use, that the portable kernels are in its place.
FASTCL_BUILD=0 leaves it out; FASTCL_BUILD=1 makes a failed build an error. FASTCL_CUDA=ON insists
on csrc/cuda, which is otherwise compiled where nvcc is found; OFF leaves it out.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
BUILD = os.environ.get("FASTCL_BUILD", "auto")


class CMakeBuild(build_ext):
    """One CMake build for all of csrc/."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # A cache of an earlier isolated build names a ninja that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        try:
            import pybind11  # not there under --no-build-isolation, unless it is installed

            configure = [
                "cmake",
                "-S",
                str(HERE),
                "-B",
                str(build),
                "-G",
                "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DFASTCL_CUDA={os.environ.get('FASTCL_CUDA', 'AUTO')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # The error that setuptools lets an optional extension have.
            raise CompileError(f"the compiled kernels were not built: {error}") from error


setup(
    ext_modules=[] if BUILD == "0" else [Extension("fastcl._C", sources=[], optional=BUILD != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
