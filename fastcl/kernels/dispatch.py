"""The one dispatch table: which backend computes the streamed primitives.

A backend is a module-like object with the methods of :class:`Backend`. ``reference`` stands apart:
it is ordinary differentiable PyTorch, and :mod:`fastcl.similarity` calls it without a custom op.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastcl.kernels.plan import TilePlan
from fastcl.kernels.tiles import Pairs, Running

REFERENCE = "reference"
AUTO = "auto"


@dataclass(frozen=True)
class Stream:
    """One similarity matrix that will never be stored, l_ij = scale_i <u_i, v_j> + biases.

    ``v=None`` means v = u: the matrix is symmetric, and only half of its tiles are made.
    ``scale`` has one element or N; ``row_bias`` too. Pairs with equal ids are dropped, and so are
    the pairs (i, i + diagonal), whose raw similarities come back as a vector of their own.
    ``scale`` and biases are in the accumulation dtype: float64 for float64, else float32.
    """

    u: Tensor
    v: Tensor | None
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    diagonal: int | None
    workspace: int

    @property
    def keys(self) -> Tensor:
        """v, or u where they are the same."""
        return self.u if self.v is None else self.v


class Needs(NamedTuple):
    """Which gradients are wanted; nothing is computed for the others."""

    u: bool = False
    v: bool = False
    scale: bool = False
    row_bias: bool = False
    col_bias: bool = False


class Gradients(NamedTuple):
    """Gradients in the order of :class:`Needs`; None where not wanted."""

    u: Tensor | None = None
    v: Tensor | None = None
    scale: Tensor | None = None
    row_bias: Tensor | None = None
    col_bias: Tensor | None = None


class LineStatistics(NamedTuple):
    """What one pass over the tiles of a stream yields; None where not asked for."""

    rows: Running | None
    cols: Running | None
    pairs: Pairs | None


class LineGradients(NamedTuple):
    """Incoming gradients, by line; None where there is none."""

    rows: Tensor | None = None
    cols: Tensor | None = None
    pairs: Tensor | None = None


class Backend(Protocol):
    """What a backend offers.

    Running statistics are in the accumulation dtype; vectors made of them, weights and incoming
    gradients of lines are in :func:`fastcl.kernels.dtypes.vector_dtype`.
    """

    default_workspace: int
    made_for: tuple[str, ...]
    """Device types on which its absence is worth a warning: something slower takes its place."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`, or None."""

    def products(self, stream: Stream) -> Any:
        """The matrix products for a stream (:class:`fastcl.kernels.walk.Products`)."""

    def plan(self, stream: Stream, *, keep: bool = False) -> TilePlan:
        """How the stream is cut; `keep`: rows of tiles that stay are welcome."""

    def logsumexp(self, stream: Stream, rows: bool, cols: bool) -> LineStatistics:
        """Running logsumexps of rows and columns, and the pairs on the dropped diagonal."""

    def logsumexp_backward(
        self,
        stream: Stream,
        statistics: LineStatistics,
        grads: LineGradients,
        needs: Needs,
        store: torch.dtype | None = None,
    ) -> Gradients:
        """Gradients, given those of the row and column logsumexps and of the pairs' logits.

        `store`: the dtype of the embeddings' gradients, where it is not the embeddings' own.
        """

    def weighted_logsumexp(
        self, stream: Stream, weights: Tensor, add_zero: bool, needs: Needs
    ) -> tuple[Tensor, Gradients]:
        """(the row values y_i, gradients of sum_i weights_i y_i)."""

    def sigmoid_rows(self, stream: Stream) -> tuple[Tensor, Pairs | None]:
        """(row sums of softplus(l_ij), the pairs on the dropped diagonal)."""

    def sigmoid_rows_backward(
        self,
        stream: Stream,
        pair_s: Tensor,
        grads: LineGradients,
        needs: Needs,
        store: torch.dtype | None = None,
    ) -> Gradients:
        """Gradients of <grads.rows, row sums> + <grads.pairs, pair logits>."""

    def sigmoid_sum(self, stream: Stream, divisor: int, needs: Needs) -> tuple[Tensor, Gradients]:
        """(sum of softplus(l_ij), softplus(-l_ii) on the diagonal, over divisor; its gradients)."""

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows divided by their L2 norm, the norms in the accumulation dtype)."""

    def normalize_backward(self, grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
        """The gradient of x, given that of its normalised rows."""


_BACKENDS: dict[str, Backend] = {}
_AUTO_ORDER: list[str] = []


def register(name: str, backend: Backend) -> None:
    """Adds a backend. "auto" prefers the one registered last among those that can run."""
    _BACKENDS[name] = backend
    _AUTO_ORDER.insert(0, name)


def get(name: str) -> Backend:
    """The backend of that name, which must be registered."""
    return _BACKENDS[name]


def names() -> list[str]:
    """Every name that ``backend=`` accepts."""
    return [AUTO, REFERENCE, *_BACKENDS]


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Names of the backends that can run on `device`, the one that "auto" would choose first.

    Example:
        >>> import fastcl
        >>> "reference" in fastcl.available_backends("cpu")
        True
    """
    device = torch.device(device)
    return [n for n in _AUTO_ORDER if _BACKENDS[n].unavailable(device) is None] + [REFERENCE]


class _Forced(threading.local):
    name: str = AUTO


_forced = _Forced()
_forced_last = AUTO  # the same as a plain global, on which torch.compile can guard
_open_contexts = 0  # in all threads
_open_lock = threading.Lock()


def _enter(name: str) -> str:
    """Counts a context, and gives the name that its leaving restores."""
    global _forced_last, _open_contexts
    with _open_lock:
        _open_contexts += 1
        previous, _forced_last = _forced_last, name
    return previous


def _leave(previous: str) -> None:
    """Restores that name, which may be of a thread that has left: not after the last context."""
    global _forced_last, _open_contexts
    with _open_lock:
        _open_contexts -= 1
        _forced_last = previous if _open_contexts else AUTO


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, in this thread, every call with ``backend="auto"`` uses this backend.

    An explicit ``backend=`` argument wins over the context. "auto" restores the free choice.

    Raises:
        ValueError: if there is no backend of that name.

    Example:
        >>> import fastcl, torch
        >>> u = torch.randn(4, 8)
        >>> with fastcl.use_backend("reference"):
        ...     loss = fastcl.info_nce(u, u)
    """
    global _forced_last
    check_name(name)
    previous, _forced.name = _forced.name, name
    if torch.compiler.is_compiling():  # a lock cannot be traced
        previous_last, _forced_last = _forced_last, name
        try:
            yield
        finally:
            _forced.name, _forced_last = previous, previous_last
        return
    previous_last = _enter(name)
    try:
        yield
    finally:
        _forced.name = previous
        _leave(previous_last)


def check_name(name: str) -> None:
    """Refuses a name that is in no table."""
    if name not in names():
        raise ValueError(f"backend={name!r} is not known; choose one of {', '.join(names())}")


def resolve(name: str, device: torch.device) -> str:
    """The backend that will run: the argument, else the context's, else the best for the device."""
    check_name(name)
    if name == AUTO:
        name = _forced_last if torch.compiler.is_compiling() else _forced.name
    if name == REFERENCE:
        return name
    if name != AUTO:
        reason = _BACKENDS[name].unavailable(device)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot be used here: {reason}")
        return name
    for candidate in _AUTO_ORDER:
        reason = _BACKENDS[candidate].unavailable(device)
        if reason is None:
            return candidate
        if device.type in _BACKENDS[candidate].made_for and not torch.compiler.is_compiling():
            _say_once(reason)
    return REFERENCE


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=_level_of_caller())


# fastcl, and what stands between the user's line and a loss that is a module.
_INTERNAL = (str(Path(__file__).parents[1]) + os.sep, torch.nn.modules.module.__file__)


def _level_of_caller() -> int:
    """The stacklevel, as our caller gives it, of the first line outside fastcl and module calls.

    (warnings' own skip_file_prefixes is new in Python 3.12.)
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    return level
