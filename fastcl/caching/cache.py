"""Gradient caching as an object that holds encoders and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.caching.budget import fitting_rows
from fastcl.caching.chunks import rows_of
from fastcl.caching.replay import without_autocast
from fastcl.caching.step import check_chunk_size, grad_cache
from fastcl.distributed import sum_over_ranks


class GradCache:
    """Encoders and a loss whose batch is larger than their activations' memory.

    Calling it with a batch makes a whole forward and backward: gradients are added to the
    parameters' as ``loss.backward()`` would, and the loss comes back detached. See
    :func:`fastcl.grad_cache` for what is done, and for a form that leaves the step to you.

    Args:
        encoders: modules or functions, one for each input of a call; the same one twice is fine.
        loss: called with the embeddings, in order, and a call's keyword arguments.
        chunk_size: rows of a chunk: one number, or one for each encoder.
        memory_budget: in place of chunk_size: bytes for the activations of all encoders together,
            from which chunks are found at the first call, a share for each encoder.
        keep: chunks whose activations are kept from the first run; None: one, or with a budget as
            many as fit it.
        strict: as for :func:`fastcl.grad_cache`.
        embeddings: picks the tensor of embeddings from what an encoder returns.
        scaler: a ``torch.amp.GradScaler``, whose ``scale`` the loss goes through.
        outside: parameters that no encoder has (a logit scale): with `group` their gradients are
            averaged over its ranks, as DistributedDataParallel does for the encoders'.
        group: process group or one-dimensional device mesh, for `outside`.

    Raises:
        ValueError, TypeError: for chunk sizes, numbers of inputs, batches or outputs that do not
            fit.

    Example:
        >>> import fastcl, torch
        >>> image_encoder, text_encoder = torch.nn.Linear(16, 8), torch.nn.Linear(12, 8)
        >>> loss = fastcl.losses.ClipLoss(normalize=True)
        >>> cached = fastcl.GradCache([image_encoder, text_encoder], loss, chunk_size=16)
        >>> value = cached(torch.randn(64, 16), torch.randn(64, 12), logit_scale=14.3)

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup".
    """

    def __init__(
        self,
        encoders: Sequence[Callable[..., Any]],
        loss: Callable[..., Tensor],
        chunk_size: int | Sequence[int] | None = None,
        *,
        memory_budget: int | None = None,
        keep: int | None = None,
        strict: bool = False,
        embeddings: Callable[[Any], Any] | None = None,
        scaler: Any = None,
        outside: Iterable[nn.Parameter] = (),
        group: Any = None,
    ) -> None:
        self.encoders = list(encoders)
        if not self.encoders:
            raise ValueError("encoders is empty; expected one for each input of a call")
        if (chunk_size is None) == (memory_budget is None):
            raise ValueError("give chunk_size or memory_budget, one of the two")
        count = len(self.encoders)
        self.chunk_sizes = [] if chunk_size is None else sizes_of("chunk_size", chunk_size, count)
        self.keeps = [1 if keep is None else keep] * count
        self.memory_budget = memory_budget
        self.loss, self.keep, self.strict, self.embeddings = loss, keep, strict, embeddings
        self.scaler, self.outside, self.group = scaler, list(outside), group

    def __call__(self, *inputs: Any, **loss_options: Any) -> Tensor:
        """The loss of a batch, detached; its gradients are in the parameters.

        Args:
            inputs: for each encoder: a tensor, a list or tuple of arguments, a mapping of keyword
                arguments, or (list, mapping) of both.
            loss_options: passed to the loss.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"{len(inputs)} inputs for {len(self.encoders)} encoders; expected one for each: a "
                "tensor, a list of arguments, or a mapping of keyword arguments"
            )
        calls = [arguments_of(each) for each in inputs]
        check_one_batch(calls)
        outside = self.outside if self.group is not None else []
        before = [None if p.grad is None else p.grad.clone() for p in outside]
        if not self.chunk_sizes:
            self._fit(calls)
        step = grad_cache(self.chunk_sizes[0], strict=self.strict, embeddings=self.embeddings)
        with step as cached:
            embedded = [
                cached.encode(encoder, call, size, keep)
                for encoder, size, keep, call in zip(
                    self.encoders, self.chunk_sizes, self.keeps, calls, strict=True
                )
            ]
            loss = self.loss(*embedded, **loss_options)
            scaled: Tensor = loss if self.scaler is None else self.scaler.scale(loss)
            with without_autocast({scaled.device}):
                scaled.backward()  # type: ignore[no-untyped-call]
        self._average_outside(before)
        return loss.detach()

    def _fit(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Chunk sizes from the budget."""
        assert self.memory_budget is not None
        share = self.memory_budget // len(self.encoders)
        found = [
            fitting_rows(encoder, share, *args, **kwargs)
            for encoder, (args, kwargs) in zip(self.encoders, calls, strict=True)
        ]
        self.chunk_sizes = [size for size, _ in found]
        if self.keep is None:
            self.keeps = [together for _, together in found]

    def _average_outside(self, before: list[Tensor | None]) -> None:
        """What this call has added to gradients outside of the encoders, as a mean over ranks."""
        if self.group is None:
            return
        size = dist.get_world_size(getattr(self.group, "get_group", lambda: self.group)())
        for parameter, old in zip(self.outside, before, strict=True):
            now = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mean = sum_over_ranks(now if old is None else now - old, self.group) / size
            parameter.grad = mean if old is None else old + mean


def sizes_of(name: str, given: int | Sequence[int], count: int) -> list[int]:
    """A chunk size for each encoder, from one number or one for each."""
    sizes = list(given) if isinstance(given, Sequence) else [given] * count
    if len(sizes) != count:
        raise ValueError(
            f"{name} has {len(sizes)} numbers for {count} encoders; expected one number, or one "
            "for each"
        )
    return [check_chunk_size(size) for size in sizes]


def arguments_of(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An encoder's arguments, from how a batch may be given."""
    if isinstance(given, Mapping):
        return (), {str(key): given[key] for key in given}
    if isinstance(given, (list, tuple)):
        if (
            len(given) == 2
            and isinstance(given[0], (list, tuple))
            and isinstance(given[1], Mapping)
        ):
            return tuple(given[0]), dict(given[1])
        return tuple(given), {}
    return (given,), {}


def check_one_batch(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Refuses encoders' inputs that are not of the same samples."""
    rows = [rows_of(call) for call in calls]
    if len(set(rows)) > 1:
        raise ValueError(
            f"the encoders' inputs have {', '.join(map(str, rows))} rows; expected the same "
            "number: row i of each belongs to row i of the others. For negatives of another number "
            "use fastcl.grad_cache, which leaves the step to you"
        )
