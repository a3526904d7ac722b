"""What computes the streamed primitives: the backends behind one dispatch table."""

from fastcl.kernels.cpu import CpuBackend
from fastcl.kernels.dispatch import available_backends, register, use_backend
from fastcl.kernels.torch_backend import TorchBackend

register("torch", TorchBackend())
register("cpu", CpuBackend())

__all__ = ["available_backends", "use_backend"]
