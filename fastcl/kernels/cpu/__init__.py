"""The CPU backend: compiled, vectorised, multi-threaded tile kernels (csrc/cpu)."""

from fastcl.kernels.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
