"""The losses as functions, a family per file."""

from fastcl.functional.clip import clip_loss
from fastcl.functional.info_nce import info_nce
from fastcl.functional.nt_xent import nt_xent
from fastcl.functional.siglip import siglip_loss

__all__ = ["clip_loss", "info_nce", "nt_xent", "siglip_loss"]
