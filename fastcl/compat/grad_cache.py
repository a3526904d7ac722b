"""A stand-in for ``grad_cache.GradCache`` (the package GradCache): change the import."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.caching.cache import arguments_of, sizes_of
from fastcl.caching.chunks import leaves
from fastcl.caching.replay import without_autocast
from fastcl.caching.step import grad_cache


class GradCache:
    """``grad_cache.GradCache``, exact: random numbers per chunk and device, one sum over ranks.

    Args:
        models: encoders, one for each input of a call.
        chunk_sizes: rows of a chunk: one number, or one for each model.
        loss_fn: called with the embeddings and a call's keyword arguments.
        split_input_fn: (input, chunk size) -> list of inputs; None: tensors are cut by rows,
            whatever they lie in.
        get_rep_fn: picks the embeddings from what a model returns.
        fp16: run models and loss under autocast to float16; needs a scaler.
        scaler: a ``torch.amp.GradScaler``.

    Raises:
        ValueError: for chunk sizes that do not fit, or fp16 without a scaler.

    Example:
        >>> import fastcl, torch
        >>> from fastcl.compat.grad_cache import GradCache
        >>> query, passage = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
        >>> gc = GradCache([query, passage], chunk_sizes=4, loss_fn=fastcl.losses.InfoNCELoss())
        >>> loss = gc(torch.randn(32, 16), torch.randn(32, 16))

    Source: GradCache's ``grad_cache.py``; Gao et al. 2021.
    """

    def __init__(
        self,
        models: Sequence[Callable[..., Any]],
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Tensor],
        split_input_fn: Callable[[Any, int], Sequence[Any]] | None = None,
        get_rep_fn: Callable[[Any], Tensor] | None = None,
        fp16: bool = False,
        scaler: Any = None,
    ) -> None:
        self.models = list(models)
        self.chunk_sizes = sizes_of("chunk_sizes", chunk_sizes, len(self.models))
        if fp16 and scaler is None:
            raise ValueError("fp16=True needs a scaler: pass scaler=torch.amp.GradScaler()")
        self.loss_fn, self.split_input_fn, self.get_rep_fn = loss_fn, split_input_fn, get_rep_fn
        self.fp16, self.scaler = fp16, scaler

    def __call__(
        self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any
    ) -> Tensor:
        """The loss, detached; its gradients are in the parameters.

        Args:
            model_inputs: for each model a tensor, a list of arguments, a mapping of keyword
                arguments, or (list, mapping).
            no_sync_except_last: accepted: gradients are always summed over ranks once.
            loss_kwargs: passed to the loss.
        """
        if len(model_inputs) != len(self.models):
            raise ValueError(f"{len(model_inputs)} inputs for {len(self.models)} models")
        with grad_cache(self.chunk_sizes[0], embeddings=self.get_rep_fn) as cached:
            with self._autocast(model_inputs):
                reps = [
                    self._encode(cached, model, given, size)
                    for model, given, size in zip(
                        self.models, model_inputs, self.chunk_sizes, strict=True
                    )
                ]
                loss = self.loss_fn(*reps, **loss_kwargs)
            scaled: Tensor = self.scaler.scale(loss) if self.fp16 else loss
            with without_autocast({scaled.device}):
                scaled.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    forward = cache_step = __call__

    def _encode(self, cached: Any, model: Callable[..., Any], given: Any, size: int) -> Any:
        if self.split_input_fn is not None:
            parts = self.split_input_fn(given, size)
            if len(parts) == 0:
                raise ValueError("split_input_fn returned no chunk; expected a list of inputs")
            return cached.encode(model, [arguments_of(part) for part in parts])
        return cached.encode(model, arguments_of(given), size)

    def _autocast(self, inputs: Any) -> contextlib.AbstractContextManager[Any]:
        if not self.fp16:
            return contextlib.nullcontext()
        device = next((x.device.type for _, x in leaves(inputs)), "cuda")
        return torch.autocast(device, dtype=torch.float16)
