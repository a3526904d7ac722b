"""What a call on one rank of several sends and multiplies, counted as it happens.

Bytes are read off the collectives that PyTorch dispatches, whoever calls them: torch.distributed,
torch.distributed.nn and its backward, batched sends; and off sends over a backend's own connections
(fastcl's ranks agree on what they compute over such). Each counts as what a rank must send of it:

=========================  =========================================================
all-gather                 its own part, to each of the W - 1 others
reduce-scatter             its input without its own part
all-to-all                 what goes to others
send                       its bytes; receiving counts nothing
all-reduce                 2 (W - 1) / W of its bytes: a reduce-scatter and an all-gather
scatter, broadcast         the root: what goes to others
gather, reduce             all but the root: their part
=========================  =========================================================

So an all-gather's backward counts alike on NCCL, where it is a reduce-scatter, and on gloo, where
PyTorch makes it of one scatter from each rank.

Products are read off PyTorch's profiler, which sees inside custom operators too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend

# torch.profiler's own would import the compiler first, for seconds.
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

# Or the profiler says that it starts and stops, each time.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")
_Arguments = dict[str, Any]


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of all in a list of (lists of) tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(x) for x in tensors)


def _input(arguments: _Arguments) -> Any:
    """What a collective is given; its name differs from one to the next."""
    names = ("input_tensors", "input_tensor", "inputs", "input_list", "input", "tensors")
    return next(arguments[name] for name in names if name in arguments)


def _to_all(arguments: _Arguments, rank: int, size: int) -> int:
    return (size - 1) * _bytes(_input(arguments))


def _all_but_own(arguments: _Arguments, rank: int, size: int) -> int:
    """Of a list with a part for each rank."""
    given = _input(arguments)
    parts = given[0] if isinstance(given[0], (list, tuple)) else given
    return _bytes(parts) - _bytes(parts[rank])


def _even_parts(arguments: _Arguments, rank: int, size: int) -> int:
    """Of one tensor, or several, with equal parts for all ranks."""
    return _bytes(_input(arguments)) // size * (size - 1)


def _all_to_all_single(arguments: _Arguments, rank: int, size: int) -> int:
    given, splits = arguments["input"], arguments["input_split_sizes"]
    if not splits:
        return _even_parts(arguments, rank, size)
    line = _bytes(given) // len(given) if len(given) else 0
    return int(sum(splits) - splits[rank]) * line


def _once(arguments: _Arguments, rank: int, size: int) -> int:
    return _bytes(_input(arguments))


def _nothing(arguments: _Arguments, rank: int, size: int) -> int:
    return 0


def _all_reduce(arguments: _Arguments, rank: int, size: int) -> int:
    return -(-2 * (size - 1) * _bytes(_input(arguments)) // size)


def _from_root(arguments: _Arguments, rank: int, size: int) -> int:
    return _to_all(arguments, rank, size) if arguments["root_rank"] == rank else 0


def _parts_from_root(arguments: _Arguments, rank: int, size: int) -> int:
    return _all_but_own(arguments, rank, size) if arguments["root_rank"] == rank else 0


def _to_root(arguments: _Arguments, rank: int, size: int) -> int:
    return 0 if arguments["root_rank"] == rank else _once(arguments, rank, size)


_SENT: dict[str, Callable[[_Arguments, int, int], int]] = {
    "allgather_": _to_all,
    "_allgather_base_": _to_all,
    "allgather_coalesced_": _to_all,
    "allgather_into_tensor_coalesced_": _to_all,
    "reduce_scatter_": _all_but_own,
    "_reduce_scatter_base_": _even_parts,
    "reduce_scatter_tensor_coalesced_": _even_parts,
    "alltoall_": _all_but_own,
    "alltoall_base_": _all_to_all_single,
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "broadcast_": _from_root,
    "scatter_": _parts_from_root,
    "gather_": _to_root,
    "reduce_": _to_root,
    "send": _once,
    "recv_": _nothing,
    "recv_any_source_": _nothing,
    "barrier": _nothing,
    "monitored_barrier_": _nothing,
}


# What a backend can be asked to send without PyTorch's dispatcher.
_DIRECT = (
    *("broadcast", "allreduce", "allreduce_coalesced", "reduce", "allgather", "_allgather_base"),
    *("allgather_coalesced", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base"),
    *("alltoall", "alltoall_base", "send"),
)


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what each collective sends, by its name."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in there, and to hide from Dynamo is to import it: a second."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[str] = Counter()

    def __enter__(self) -> _Listener:
        self._patches = ExitStack()
        for name in _DIRECT:
            method = partial(self._direct, name, getattr(Backend, name))
            # A plain function, not a partial, is bound to its backend when it is called.
            bound = mock.patch.object(Backend, name, lambda *a, call=method: call(*a))
            self._patches.enter_context(bound)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def _direct(self, name: str, method: Any, backend: Any, tensors: Any, *args: Any) -> Any:
        if name != "send":
            raise NotImplementedError(f"nobody has said what a backend's own {name} sends")
        self.sent["Backend.send"] += _bytes(tensors)
        return method(backend, tensors, *args)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _NAMESPACES:
            self._add(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _add(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if func.namespace != "c10d" or name not in _SENT:
            raise NotImplementedError(f"nobody has said what {func} sends; see {__name__}")
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        if sent := _SENT[name](arguments, group.rank(), group.size()):
            self.sent[name] += sent


def bytes_sent(call: Callable[[], Any]) -> dict[str, int]:
    """What this rank sends in the call, by collective; other ranks must make the same call.

    A backward in there counts where it runs in the thread of the call: on CPU tensors it does.

    Raises:
        NotImplementedError: a collective that the convention above does not have.
    """
    with _Listener() as listener:
        call()
    return dict(listener.sent)


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] x [inner, cols], `count` times."""

    rows: int
    inner: int
    cols: int
    count: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.count * self.rows * self.inner * self.cols


# Where their two factors stand among the inputs.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}


def products(call: Callable[[], Any]) -> list[Product]:
    """The matrix products that PyTorch makes in the call, inside custom operators too.

    (Not what a library of our own makes: fastcl's AMX products for bfloat16, Triton's kernels.)
    """
    with profile(record_shapes=True) as profiler:
        call()
    return list(_products(profiler.function_events or ()))


def _products(events: Iterable[Any]) -> Iterable[Product]:
    for event in events:
        name = event.name.removeprefix("aten::")
        if event.name != name and name in _PRODUCTS:
            left, right = event.input_shapes[_PRODUCTS[name] :][:2]
            *count, rows, inner = left
            yield Product(rows, inner, right[-1], count[0] if count else 1)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that PyTorch holds on the CPU at any time in the call, beside what it held before.

    (Not what gloo holds while it sends. The call must free nothing that was there before it.)
    """
    with profile(profile_memory=True) as profiler:
        call()
    assert profiler.kineto_results is not None
    events = [x for x in profiler.kineto_results.events() if x.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


@dataclass(frozen=True)
class Work:
    """What one call costs this rank.

    `similarities`: entries of the matrix of similarities that are made, again in the backward
    included; `tiles`: in how many products. Those are the products over the embeddings' dimension.
    """

    sent: dict[str, int]
    flops: int
    tiles: int
    similarities: int

    @property
    def bytes_sent(self) -> int:
        """By all collectives."""
        return sum(self.sent.values())


def count(call: Callable[[], Any], dim: int) -> Work:
    """Counts a call on embeddings of `dim` numbers, which is made twice.

    No other dimension that is multiplied over may be `dim`.
    """
    sent, made = bytes_sent(call), products(call)
    tiles = [x for x in made if x.inner == dim]
    return Work(
        sent=sent,
        flops=sum(x.flops for x in made),
        tiles=sum(x.count for x in tiles),
        similarities=sum(x.count * x.rows * x.cols for x in tiles),
    )
