"""What callers may pass, checked at once: shapes, dtypes, devices and Python numbers.

The values of tensors are never read: that would stop a GPU, and break tracing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcl.kernels.dtypes import accumulation_dtype

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in x.shape) + "]"


def check_embeddings(may_be_empty: bool = False, /, **named: Tensor) -> list[Tensor]:
    """Matrices of embeddings [N, D] that share D, device and, after promotion, dtype.

    `may_be_empty`: there may be no rows (on one rank of several).
    """
    names, tensors = list(named), list(named.values())
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape [N, D], not {_type(x)}")
        if x.dim() != 2:
            raise ValueError(
                f"{name} has shape {_shape(x)}; expected [N, D], one embedding per row"
                + (" (flatten the leading dimensions first)" if x.dim() > 2 else "")
            )
        check_dtype(name, x)
        if (x.shape[0] == 0 and not may_be_empty) or x.shape[1] == 0:
            raise ValueError(
                f"{name} is empty (shape {_shape(x)}): a contrastive loss needs at least one row "
                "and one dimension; skip the step for an empty batch"
            )
    first = tensors[0]
    for name, x in zip(names[1:], tensors[1:], strict=True):
        if x.shape[1] != first.shape[1]:
            raise ValueError(
                f"{names[0]} has dimension {first.shape[1]} and {name} has {x.shape[1]}: "
                "embeddings that are compared must have the same dimension D"
            )
        check_device(**{names[0]: first, name: x})
    return promoted(*tensors)


def check_dtype(name: str, x: Tensor | torch.dtype) -> None:
    """A dtype that embeddings may have, or one of a tensor."""
    dtype = x.dtype if isinstance(x, Tensor) else x
    if dtype not in SUPPORTED:
        raise TypeError(
            f"{name} has dtype {dtype}; expected one of "
            + ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED)
        )


def check_device(**named: Tensor) -> None:
    """Two tensors on one device."""
    (name_a, a), (name_b, b) = named.items()
    if a.device != b.device:
        raise ValueError(
            f"{name_a} is on {a.device} and {name_b} on {b.device}: move them to one device"
        )


def promoted(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype that PyTorch promotes them to."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def check_transforms(*tensors: Tensor | None) -> None:
    """Refuses what the streamed backends would silently get wrong: forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is None:
            continue
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
        dual = torch.autograd.forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
        if wrapped or dual.tangent is not None:
            raise RuntimeError(
                "fastcl's streamed losses have reverse-mode gradients only; for torch.func "
                'transforms and forward-mode derivatives use backend="reference"'
            )


def check_paired(**named: Tensor) -> None:
    """Rows that belong together, one to one."""
    (name_a, a), (name_b, b) = named.items()
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{name_a} has {a.shape[0]} rows and {name_b} has {b.shape[0]}: row i of one is the "
            "positive of row i of the other, so they need the same number of rows"
        )


def python_number(value: Any) -> Any:
    """A NumPy scalar as the Python number it stands for; everything else, bools too, as it is.

    (torch.compile traces a NumPy scalar that is passed to it as an array, which is refused.)
    """
    if isinstance(value, np.floating):
        return float(value)
    return int(value) if isinstance(value, np.integer) else value


def check_number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A float, or a tensor with one element, as a 0-dim tensor in the accumulation dtype."""
    return check_scale(name, value, like, per_row=False)


def check_scale(name: str, value: float | Tensor, like: Tensor, *, per_row: bool = True) -> Tensor:
    """A float, a tensor with one element, or (with `per_row`) one number per row of `like`."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating-point tensor")
        if value.dim() <= 1 and value.numel() == 1:
            return value.reshape(()).to(device=like.device, dtype=dtype)
        if per_row and value.shape == like.shape[:1]:
            return value.to(device=like.device, dtype=dtype)
        rows = f", or [{like.shape[0]}] (one per row)" if per_row else ""
        raise ValueError(
            f"{name} has shape {_shape(value)}; expected a float or a tensor with one element{rows}"
        )
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a tensor with one element, not {_type(value)}")
    if not abs(value) < math.inf:  # NaN too; math.isfinite cannot be traced
        raise ValueError(f"{name} is {value}; expected a finite number")
    return torch.full((), float(value), dtype=dtype, device=like.device)


def check_temperature(value: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature, as a 0-dim tensor; a Python number must be positive."""
    if not isinstance(value, Tensor):
        number = check_number("temperature", value, like)
        if value <= 0:
            raise ValueError(f"temperature is {value}; expected a positive number such as 0.07")
        return number.reciprocal()
    return check_number("temperature", value, like).reciprocal()


def check_vector(name: str, value: Tensor | None, length: int, like: Tensor) -> Tensor | None:
    """A floating vector of that length, in the accumulation dtype."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != (length,) or not value.is_floating_point():
        given = f"{value.dtype} {_shape(value)}" if isinstance(value, Tensor) else _type(value)
        raise ValueError(f"{name} is {given}; expected a floating-point tensor of shape [{length}]")
    return value.to(device=like.device, dtype=accumulation_dtype(like.dtype))


def check_ids(name: str, ids: Tensor | None, length: int, like: Tensor) -> Tensor | None:
    """Integers [length] on the device of the embeddings."""
    if ids is None:
        return None
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape [{length}], not {_type(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"{name} has dtype {ids.dtype}; expected integers (ids are compared for equality)"
        )
    if ids.shape != (length,):
        raise ValueError(f"{name} has shape {_shape(ids)}; expected [{length}], one id per row")
    return ids.to(device=like.device, dtype=torch.int64)


def check_diagonal(name: str, diagonal: int | None, columns: int) -> int | None:
    """The column of row 0's pair, or None."""
    if diagonal is None:
        return None
    diagonal = python_number(diagonal)
    if isinstance(diagonal, bool) or not isinstance(diagonal, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or None, not {_type(diagonal)}")
    if diagonal < 0 or diagonal >= columns:
        raise ValueError(
            f"{name} is {diagonal}; expected 0 to {columns - 1}, the column of row 0's pair"
        )
    return diagonal


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def check_divisor(divisor: int) -> int:
    """A count to divide a sum by."""
    divisor = python_number(divisor)
    if isinstance(divisor, bool) or not isinstance(divisor, (int, torch.SymInt)) or divisor < 1:
        raise ValueError(f"divisor is {divisor!r}; expected a count of at least 1")
    return divisor


def check_workspace(workspace: int | None, default: int) -> int:
    """A budget in bytes; None takes the backend's default."""
    if workspace is None:
        return default
    workspace = python_number(workspace)
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace must be a number of bytes (an int), not {_type(workspace)}")
    if workspace < 1 << 16:
        raise ValueError(
            f"workspace is {workspace} bytes; expected at least {1 << 16}, such as 256 << 20"
        )
    return workspace


def _type(value: Any) -> str:
    return type(value).__name__
