"""One training step whose encoders run chunk by chunk."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.caching.chunks import bounds, devices_of, leaves, part_of, rows_of
from fastcl.caching.modules import (
    NotExact,
    all_modules,
    check_exact,
    modules_of,
    summing_modules,
    without_sums,
)
from fastcl.caching.replay import Surroundings, without_autocast

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Encoded:
    """One encoder's pass over a batch: what its chunks need to be run again."""

    encoder: Callable[..., Any]
    inputs: Any  # a call of the whole batch, or a list of calls, one for each chunk
    pick: Callable[[Any], Any]
    chunks: list[tuple[int, int]]
    surroundings: list[Surroundings | None] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)  # embeddings with their graph
    leaf: Tensor | None = None
    modes: dict[nn.Module, bool] = field(default_factory=dict)
    strict: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return getattr(self.encoder, "__name__", type(self.encoder).__name__)

    @property
    def devices(self) -> set[torch.device]:
        """Of its inputs and parameters."""
        return devices_of(self.inputs, modules_of(self.encoder))

    @contextlib.contextmanager
    def in_its_modes(self) -> Iterator[None]:
        """In there, modules train or evaluate as they did in the first pass."""
        now = {module: module.training for module in self.modes}
        for module, training in self.modes.items():
            module.training = training
        try:
            yield
        finally:
            for module, training in now.items():
                module.training = training

    def run(self, index: int) -> Tensor:
        """The embeddings of a chunk."""
        if isinstance(self.inputs, list):
            args, kwargs = self.inputs[index]
        else:
            args, kwargs = part_of(self.inputs, *self.chunks[index], self.chunks[-1][1])
        out = self.pick(self.encoder(*args, **kwargs))
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{self.name} returned {type(out).__name__}; expected a tensor of embeddings, "
                "a row for each row of its inputs: pick it with embeddings=, such as "
                "embeddings=lambda out: out.pooler_output"
            )
        rows = None  # of a call of one's own: as many as come back
        if not isinstance(self.inputs, list):
            start, stop = self.chunks[index]
            rows = stop - start
        if out.dim() == 0 or (rows is not None and len(out) != rows):
            raise ValueError(
                f"{self.name} returned embeddings of shape {list(out.shape)} for a chunk of "
                f"{rows} rows; expected a row for each"
            )
        return out


class GradCacheStep:
    """The chunks of one step; see :func:`fastcl.grad_cache`, which makes it."""

    def __init__(
        self,
        chunk_size: int,
        *,
        keep: int,
        strict: bool,
        embeddings: Callable[[Any], Any] | None,
    ) -> None:
        self._chunk_size, self._keep = check_chunk_size(chunk_size), check_keep(keep)
        self._strict = strict
        self._pick = embeddings or (lambda out: out)
        self._encoded: list[_Encoded] = []
        self._open = False

    def __enter__(self) -> GradCacheStep:
        if self._open:
            raise RuntimeError("this step is open already: make another, fastcl.grad_cache(...)")
        self._open = True
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        encoded, self._encoded = self._encoded, []
        if error is None:
            _replay(encoded)

    def __call__(
        self,
        encoder: Callable[..., Any],
        /,
        *args: Any,
        chunk_size: int | None = None,
        keep: int | None = None,
        embeddings: Callable[[Any], Any] | None = None,
        chunks: Sequence[Call] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The embeddings of all rows, as a leaf: its gradient is passed on when the block ends.

        Args:
            encoder: a module or function; called with chunks of the arguments.
            args, kwargs: tensors with one row for each sample, or lists, tuples, mappings and
                dataclasses of them; whatever else is in them goes to every chunk as it is.
            chunk_size, keep, embeddings: in place of the step's own.
            chunks: the calls themselves, (arguments, keyword arguments) of each chunk, in place of
                args and kwargs.
        """
        inputs: Any = (args, kwargs) if chunks is None else list(chunks)
        if chunks is not None and (args or kwargs or not inputs):
            raise ValueError("chunks= is empty, or stands beside other arguments of the encoder")
        return self.encode(encoder, inputs, chunk_size, keep, embeddings)

    def encode(
        self,
        encoder: Callable[..., Any],
        inputs: Any,
        chunk_size: int | None = None,
        keep: int | None = None,
        embeddings: Callable[[Any], Any] | None = None,
    ) -> Tensor:
        """The same of (arguments, keyword arguments), or of a list of them, one for each chunk."""
        if not self._open:
            raise RuntimeError(
                "encode inside the block: with fastcl.grad_cache(...) as cached: ..."
            )
        size = self._chunk_size if chunk_size is None else check_chunk_size(chunk_size)
        if isinstance(inputs, list):
            parts = [(i, i + 1) for i in range(len(inputs))]  # until their rows are known
        else:
            parts = bounds(rows_of(inputs), size)
        each = _Encoded(encoder, inputs, embeddings or self._pick, parts, strict=self._strict)
        if not torch.is_grad_enabled():
            return torch.cat([each.run(i) for i in range(len(each.chunks))])
        check_exact(encoder, self._strict)
        _check_leaves(inputs)
        each.modes = {module: module.training for module in all_modules(encoder).values()}
        each.leaf = _first_pass(each, self._keep if keep is None else check_keep(keep))
        if each.leaf.requires_grad:
            self._encoded.append(each)
        return each.leaf


def check_chunk_size(chunk_size: Any) -> int:
    """A number of rows."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; expected a number of rows, at least 1")
    return chunk_size


def check_keep(keep: Any) -> int:
    """A number of chunks."""
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise ValueError(f"keep is {keep!r}; expected a number of chunks, 0 or more")
    return keep


def _check_leaves(inputs: Any) -> None:
    for path, x in leaves(inputs):
        if x.requires_grad and not x.is_leaf:
            raise ValueError(
                f"inputs{path} comes from a computation that wants a gradient, and several chunks "
                "cannot go back through: make what computes it a part of the encoder"
            )


def _first_pass(each: _Encoded, keep: int) -> Tensor:
    """Embeddings of all chunks, without graphs but for the last few."""
    count = len(each.chunks)
    if summing_modules(each.encoder):
        keep = min(keep, count - 1)  # the one whose backward sums over ranks is run again
    devices, parts = each.devices, []
    with without_sums(each.encoder):
        for i in range(count):
            with_graph = i >= count - keep
            if with_graph and i == count - keep:
                # Casts that autocast has made without a graph would be taken for ones with it.
                torch.clear_autocast_cache()
            before = each.surroundings[-1] if each.surroundings else None
            each.surroundings.append(None if with_graph else Surroundings.now(devices, before))
            with torch.set_grad_enabled(with_graph):
                part = each.run(i)
            if with_graph:
                each.kept[i] = part
            parts.append(part.detach())
    torch.clear_autocast_cache()
    stops = [0, *accumulate(len(part) for part in parts)]
    each.chunks = list(pairwise(stops))
    wanted = _wants_gradient(each)
    if not wanted:
        each.kept = {}
    return torch.cat(parts).requires_grad_(wanted)


def _wants_gradient(each: _Encoded) -> bool:
    if each.kept:
        return any(part.requires_grad for part in each.kept.values())
    if any(x.requires_grad for _, x in leaves(each.inputs)):
        return True
    modules = modules_of(each.encoder)
    return not modules or any(p.requires_grad for m in modules for p in m.parameters())


def _replay(encoded: list[_Encoded]) -> None:
    """Passes the embeddings' gradients on into the encoders, a chunk at a time.

    From the last batch to the first: one's inputs may be embeddings of one before.
    """
    passed_on = {id(x) for each in encoded for _, x in leaves(each.inputs)}
    for each in encoded:
        if id(each.leaf) not in passed_on:
            _check_has_gradient(each)
    if not encoded:
        return
    order = encoded[::-1]
    last = {id(m): i for i, each in enumerate(order) for m in summing_modules(each.encoder)}
    devices = set().union(*(each.devices for each in encoded))
    after = Surroundings.now(devices)
    try:
        with torch.enable_grad(), without_autocast(devices):
            for i, each in enumerate(order):
                _check_has_gradient(each)
                _backward(each, loud={key for key, at in last.items() if at == i})
    finally:
        after.restore()  # as if nothing had been run again


def _check_has_gradient(each: _Encoded) -> None:
    assert each.leaf is not None
    if each.leaf.grad is None:
        raise RuntimeError(
            f"the embeddings of {each.name} have no gradient at the end of the step: call "
            "loss.backward() inside the block, on a loss that depends on them; encode what needs "
            "no gradient under torch.no_grad()"
        )


def _backward(each: _Encoded, loud: set[int]) -> None:
    """The second pass over one batch; `loud`: what sums over ranks in its last chunk's backward."""
    assert each.leaf is not None
    grad = each.leaf.grad
    assert grad is not None
    order = [*each.kept, *(i for i in range(len(each.chunks)) if i not in each.kept)]
    for i in order:
        rows = slice(*each.chunks[i])
        with without_sums(each.encoder, loud if i == order[-1] else ()):
            part = each.kept.pop(i, None)
            if part is None:
                surroundings = each.surroundings[i]
                assert surroundings is not None
                with surroundings.again(), each.in_its_modes():
                    part = each.run(i)
                _check_same(each, part.detach(), each.leaf.detach()[rows])
            if part.requires_grad:
                torch.autograd.backward(part, grad[rows].to(part.dtype))
    each.leaf.grad = None
    each.leaf.register_hook(_too_late)  # type: ignore[no-untyped-call]


def _check_same(each: _Encoded, again: Tensor, first: Tensor) -> None:
    """Notices an encoder that gives other embeddings when it is run again."""
    eps = torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
    largest = first.abs().amax() if first.numel() else 0.0
    off = (again - first).abs() > 64 * eps * largest  # what another order of sums may do
    if again.shape == first.shape and not bool(off.any()):
        return
    message = (
        f"{each.name} gave other embeddings when it was run again, so that the gradient is not "
        "that of the loss: it changes its inputs or its buffers, or draws from a generator that is "
        "not saved (PyTorch's, Python's and NumPy's global ones are)"
    )
    if each.strict:
        raise RuntimeError(message + " (strict=True refuses)")
    warnings.warn(message, NotExact, stacklevel=2)


def _too_late(_: Tensor) -> None:
    raise RuntimeError(
        "a backward through cached embeddings after their block has ended reaches no encoder: call "
        "it inside of the block"
    )


def grad_cache(
    chunk_size: int,
    *,
    keep: int = 1,
    strict: bool = False,
    embeddings: Callable[[Any], Any] | None = None,
) -> GradCacheStep:
    r"""A training step whose encoders run chunk by chunk, with the gradient of the whole batch.

    .. math:: \frac{\partial L}{\partial \theta} = \sum_c \Bigl\langle \frac{\partial L}{\partial
        R_c}, \frac{\partial R_c}{\partial \theta} \Bigr\rangle

    where R_c are the embeddings of chunk c. Each encoder runs twice over every chunk but the last:
    first without a graph; then, when the block ends, again with one, into which the gradient of its
    embeddings is passed. The activations of one chunk are alive at a time, whatever the batch.
    Random numbers (dropout) and autocast are in the second run what they were in the first.

    Args:
        chunk_size: rows of a chunk.
        keep: chunks of each encoder, the last ones, whose activations are kept from the first run.
        strict: refuse encoders for which chunks are not exact (BatchNorm in train mode), instead of
            a warning.
        embeddings: picks the tensor of embeddings from what an encoder returns.

    Returns:
        A context manager; called with an encoder and its inputs it returns embeddings [N, ...].

    Raises:
        ValueError, TypeError: for chunk sizes, inputs or outputs that do not fit.
        RuntimeError: when the block ends, if a batch of embeddings has no gradient.

    Example:
        >>> import fastcl, torch
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout())
        >>> views = torch.randn(64, 16), torch.randn(64, 16)
        >>> with fastcl.grad_cache(chunk_size=16) as cached:
        ...     z0, z1 = (cached(encoder, view) for view in views)
        ...     fastcl.nt_xent(z0, z1, normalize=True).backward()

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup".
    """
    return GradCacheStep(chunk_size, keep=keep, strict=strict, embeddings=embeddings)
