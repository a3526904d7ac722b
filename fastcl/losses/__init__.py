"""The losses as modules."""

from fastcl.losses.sigmoid import SigLipLoss
from fastcl.losses.softmax import ClipLoss, InfoNCELoss, NTXentLoss

__all__ = ["ClipLoss", "InfoNCELoss", "NTXentLoss", "SigLipLoss"]
