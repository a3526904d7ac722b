"""Drop-in classes, one module for each library that they stand in for."""

from fastcl.compat import grad_cache, open_clip

__all__ = ["grad_cache", "open_clip"]
