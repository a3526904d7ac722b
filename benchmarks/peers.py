"""Other libraries' losses across ranks, as they are, and open_clip's restated.

They are taken from wherever they import from. Where open_clip's or Lightly's packages want image
libraries that are not there, the module that defines the loss is loaded without running the
packages' `__init__`, and without what it imports of those and does not use: the loss is the
library's own either way.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Distribution, module, and the packages that the module and its own imports lie in.
_WHERE = {
    "open_clip": ("open_clip_torch", "open_clip.loss", ("open_clip",)),
    "lightly": (
        "lightly",
        "lightly.loss.ntx_ent_loss",
        ("lightly", "lightly.loss", "lightly.utils", "lightly.models", "lightly.models.modules"),
    ),
    "pytorch_metric_learning": (
        "pytorch-metric-learning",
        "pytorch_metric_learning.utils.distributed",
        (),
    ),
    "gradcache": ("gradcache", "grad_cache.loss", ()),
}
LIBRARIES = tuple(_WHERE)
_UNUSED = ("torchvision", "torchvision.ops")  # Lightly's memory bank imports a layer of it


def load(library: str) -> Any:
    """The module that defines the library's loss.

    Raises:
        ImportError: it is not there, or does not import.
    """
    _, module, packages = _WHERE[library]
    if library == "gradcache":
        _rename_gradcache()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not packages or error.name == packages[0]:
            raise
    for name in packages:
        _register_bare(name)
    with _placeholders():
        return importlib.import_module(module)


def version(library: str) -> str | None:
    """Of the installed (or unpacked) distribution; None of what is in this repository."""
    if library not in _WHERE:
        return None
    try:
        return metadata.version(_WHERE[library][0])
    except metadata.PackageNotFoundError:
        return None


def _rename_gradcache() -> None:
    """Its source distribution is named gradcache, and imports itself as grad_cache."""
    try:
        importlib.import_module("grad_cache")
    except ModuleNotFoundError:
        sys.modules["grad_cache"] = importlib.import_module("gradcache")


def _register_bare(name: str) -> None:
    """A package as an empty module that knows where its modules are."""
    if name in sys.modules:
        return
    parent = sys.modules.get(name.rpartition(".")[0])
    spec = PathFinder.find_spec(name, None if parent is None else list(parent.__path__))
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    bare: ModuleType = module_from_spec(spec)
    sys.modules[name] = bare
    if parent is not None:
        setattr(parent, name.rpartition(".")[2], bare)


@contextlib.contextmanager
def _placeholders() -> Iterator[None]:
    """Empty modules for what is imported and not used, where it is absent."""
    absent = [name for name in _UNUSED if not _is_there(name)]
    for name in absent:
        sys.modules[name] = module = ModuleType(name)
        module.__dict__["StochasticDepth"] = type("StochasticDepth", (), {})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def two_sided_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss(local_loss=True, gather_with_grad=True), restated for its counts.

    All rows of both towers come to each rank, which compares its own images with all texts, and its
    own texts with all images: L_r = (CE(t u_r V^T) + CE(t v_r U^T)) / 2, means over its own rows.
    """
    import torch.distributed as dist

    towers = [image, text]
    if dist.get_world_size() > 1:
        towers = [torch.cat(gather_with_gradient(x)) for x in towers]
    everyones_images, everyones_texts = towers
    own = torch.arange(len(image)) + dist.get_rank() * len(image)
    by_image = F.cross_entropy(scale * image @ everyones_texts.T, own)
    by_text = F.cross_entropy(scale * text @ everyones_images.T, own)
    return (by_image + by_text) / 2


def gather_with_gradient(x: Tensor) -> tuple[Tensor, ...]:
    """The all-gather of torch.distributed.nn, whose backward is a reduce-scatter."""
    import torch.distributed.nn.functional

    all_gather: Any = torch.distributed.nn.functional.all_gather
    parts: tuple[Tensor, ...] = all_gather(x)
    return parts
