"""csrc/cuda is in the extension where nvcc was found, and only there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from fastcl.kernels.cpu import backend as compiled

pytestmark = pytest.mark.skipif(
    compiled._extension is None, reason="there is no compiled extension to ask"
)
BUILT = compiled._extension is not None and compiled._extension.cuda_runtime()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH to compare with")
@pytest.mark.skipif(os.environ.get("FASTCL_CUDA") == "OFF", reason="left out on request")
def test_the_cuda_part_is_of_the_compiler_that_is_here() -> None:
    told = subprocess.check_output(["nvcc", "--version"], text=True)
    major, minor = re.search(r"release (\d+)\.(\d+)", told).groups()  # type: ignore[union-attr]
    assert compiled._extension.cuda_runtime() == 1000 * int(major) + 10 * int(minor)
    assert compiled._extension.cuda_architectures().startswith("80 90")


@pytest.mark.skipif(bool(BUILT), reason="the extension has its CUDA part")
def test_without_it_the_extension_says_so() -> None:
    assert compiled._extension.cuda_architectures() == ""
