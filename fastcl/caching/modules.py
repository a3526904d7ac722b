"""What is asked of encoders: whether chunks are as good as the batch, and who sums gradients."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


class NotExact(UserWarning):
    """Chunks of the batch are not as good as the whole of it for some module."""


def modules_of(encoder: Any) -> list[nn.Module]:
    """The modules that an encoder is, or reaches: as a method, a partial, or a function around one.

    Outermost only; `all_modules` has those within.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    things = [encoder]
    while things and len(seen) < 1000:
        thing = things.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif isinstance(thing, functools.partial):
            things += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, (list, tuple)):
            things += thing
        elif callable(thing):
            things.append(getattr(thing, "__self__", None))
            things.append(getattr(thing, "__wrapped__", None))
            for cell in getattr(thing, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # not filled yet
                    things.append(cell.cell_contents)
    return list(found.values())


def all_modules(encoder: Any) -> dict[str, nn.Module]:
    """Every module that an encoder has, by name."""
    return {name: m for root in modules_of(encoder) for name, m in root.named_modules()}


def inexact_modules(encoder: Any) -> dict[str, str]:
    """Modules whose outputs or states depend on the other rows of a batch: name and why."""
    found = {}
    for name, module in all_modules(encoder).items():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            found[name] = (
                f"{kind} normalises over a chunk, not over the batch, and counts each chunk twice"
            )
        elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            found[name] = f"{kind} with running statistics updates them twice for each row"
        elif module.training and _iterates(module):
            found[name] = f"{kind} under spectral normalisation iterates in each chunk"
    return found


def _iterates(module: nn.Module) -> bool:
    """Whether its weight goes through a power iteration, by either of PyTorch's two ways."""
    parametrized: Any = getattr(module, "parametrizations", {})
    kinds = {type(p).__name__ for each in parametrized for p in parametrized[each]}
    kinds |= {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
    return bool(kinds & {"_SpectralNorm", "SpectralNorm"})


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
        "eval mode (with running statistics), or use GroupNorm or LayerNorm"
    )
    if strict:
        raise ValueError(message + " (strict=True refuses)")
    warnings.warn(message, NotExact, stacklevel=4)


def summing_modules(encoder: Any) -> list[nn.Module]:
    """The modules in it that sum gradients over ranks in the backward."""
    return [
        module
        for module in all_modules(encoder).values()
        if callable(getattr(module, "no_sync", None))
        or callable(getattr(module, "set_requires_gradient_sync", None))
    ]


@contextlib.contextmanager
def without_sums(encoder: Any, loud: Collection[int] = ()) -> Iterator[None]:
    """In there, a backward leaves gradients on their rank, but for modules with ids in `loud`."""
    with contextlib.ExitStack() as stack:
        for module in summing_modules(encoder):
            if id(module) not in loud:
                stack.enter_context(_quiet(module))
        yield


@contextlib.contextmanager
def _quiet(module: Any) -> Iterator[None]:
    no_sync = getattr(module, "no_sync", None)
    if no_sync is not None:  # DistributedDataParallel
        with no_sync():
            yield
        return
    # fully_shard, whose flag has no getter; it may be off, as a user accumulates gradients.
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    group = getattr(state, "_fsdp_param_group", None)
    before = getattr(group, "reduce_grads", True)
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(before)
