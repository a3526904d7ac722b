"""What is asked of encoders: whether chunks are as good as the batch, and who sums gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


class NotExact(UserWarning):
    """Chunks of the batch are not as good as the whole of it for some module."""


def inexact_modules(encoder: Any) -> dict[str, str]:
    """Modules whose outputs or states depend on the other rows of a batch: name and why."""
    if not isinstance(encoder, nn.Module):
        return {}
    found = {}
    for name, module in encoder.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            found[name] = f"{kind} in train mode normalises over a chunk, not over the batch"
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:
            found[name] = f"{kind} with running statistics updates them twice for each row"
        elif hasattr(module, "parametrizations") and "weight" in module.parametrizations:
            kinds = [type(p).__name__ for p in module.parametrizations["weight"]]
            if "_SpectralNorm" in kinds:
                found[name] = f"{kind} under spectral normalisation iterates in each chunk"
    return found


def check_exact(encoder: Any, strict: bool) -> None:
    """Warns of modules for which a gradient cache is not exact; refuses them where `strict`.

    Raises:
        ValueError: with `strict`, if there are such modules.
    """
    found = inexact_modules(encoder)
    if not found:
        return
    said = "; ".join(f"{name or 'the encoder itself'}: {why}" for name, why in found.items())
    message = (
        f"gradient caching of {type(encoder).__name__} is not exact: {said}. Put such modules in "
        "eval mode, or use GroupNorm or LayerNorm"
    )
    if strict:
        raise ValueError(message + " (strict=True refuses)")
    warnings.warn(message, NotExact, stacklevel=4)


def sums_over_ranks(encoder: Any) -> bool:
    """Whether it is wrapped in what sums gradients over ranks in the backward."""
    return isinstance(encoder, nn.Module) and (
        callable(getattr(encoder, "no_sync", None))
        or callable(getattr(encoder, "set_requires_gradient_sync", None))
    )


@contextlib.contextmanager
def without_sums(encoder: Any) -> Iterator[None]:
    """In there, a backward of the encoder leaves gradients on their rank."""
    no_sync: Callable[[], Any] | None = getattr(encoder, "no_sync", None)
    set_sync = getattr(encoder, "set_requires_gradient_sync", None)
    if not sums_over_ranks(encoder):
        yield
    elif no_sync is not None:  # DistributedDataParallel
        with no_sync():
            yield
    else:  # fully_shard
        assert set_sync is not None
        set_sync(False)
        try:
            yield
        finally:
            set_sync(True)
