"""Gradient caching: batches larger than the encoders' activations would fit, exactly."""

from fastcl.caching.budget import activation_bytes, fitting_rows
from fastcl.caching.cache import GradCache
from fastcl.caching.modules import NotExact
from fastcl.caching.step import GradCacheStep, grad_cache

__all__ = [
    "GradCache",
    "GradCacheStep",
    "NotExact",
    "activation_bytes",
    "fitting_rows",
    "grad_cache",
]
