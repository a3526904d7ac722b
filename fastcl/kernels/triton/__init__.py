"""The Triton backend: similarities made, reduced and forgotten inside one kernel."""

from fastcl.kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
