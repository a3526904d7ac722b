"""What computes the streamed primitives: the backends behind one dispatch table."""

from fastcl.kernels.cpu import CpuBackend
from fastcl.kernels.dispatch import available_backends, register, use_backend
from fastcl.kernels.torch_backend import TorchBackend
from fastcl.kernels.triton import TritonBackend

register("torch", TorchBackend())
register("triton", TritonBackend())
register("cpu", CpuBackend())

__all__ = ["available_backends", "use_backend"]
