"""Drop-in classes, one module for each library that they stand in for."""

from fastcl.compat import open_clip

__all__ = ["open_clip"]
