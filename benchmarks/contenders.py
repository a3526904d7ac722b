"""Who takes part in a case: fastcl, eager PyTorch, torch.compile, peers, and the bare GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import BOTH, Case, Phase
from benchmarks.eager import EAGER, EAGER_VARIANTS, LossFunction
from benchmarks.inputs import Inputs
from benchmarks.ours import fastcl_loss
from benchmarks.schema import without_paths
from benchmarks.timing import Contender

FASTCL, EAGER_FORM, COMPILED, GEMMS = "fastcl", "eager", "compiled", "gemms"
EAGER_VARIANT = "eager-transposed"
MATRIX_STORING = (EAGER_FORM, EAGER_VARIANT, COMPILED)

# Other libraries: a name, and a function that gives their loss of a case's tensors (see
# benchmarks/inputs.py), or None where they do not have it. It may raise where it is not installed.
Peer = Callable[[Case], LossFunction | None]
PEERS: dict[str, Peer] = {}


def all_names() -> tuple[str, ...]:
    """Every contender's name."""
    return (FASTCL, EAGER_FORM, EAGER_VARIANT, COMPILED, *PEERS, GEMMS)


def loss_function(name: str, case: Case, backend: str) -> LossFunction | None:
    """The function of the case's tensors that a contender runs; None where it has none."""
    if name == FASTCL:
        return fastcl_loss(case.loss, backend)
    if name == EAGER_FORM:
        return EAGER[case.loss]
    if name == EAGER_VARIANT:
        return EAGER_VARIANTS.get(case.loss)
    if name == COMPILED:
        torch.compiler.reset()
        return torch.compile(EAGER[case.loss], dynamic=False)
    return PEERS[name](case)


def bytes_needed(name: str, case: Case) -> int:
    """About what a contender that stores the matrix takes, forward and backward together."""
    if name not in MATRIX_STORING:
        return 0
    rows, cols = case.matrix
    itemsize = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    return 8 * rows * cols * itemsize


def run_once(function: LossFunction, inputs: Inputs, phase: Phase) -> object:
    """One timed call: the loss, and its gradients where they are part of the phase."""
    if phase != BOTH:
        with torch.no_grad():
            return function(*inputs.arguments())
    loss = function(*inputs.arguments())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def loss_contender(
    name: str, function: LossFunction, sets: list[Inputs], phase: Phase
) -> Contender:
    """A contender that computes the loss; its gradients are set to None before each call."""
    return Contender(
        name,
        step=lambda index: run_once(function, sets[index], phase),
        before=lambda index: sets[index].clear_gradients(),
    )


def failure_text(error: BaseException) -> str:
    """One line on why something did not run, without paths of the machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = without_paths(lines[0] if lines else "")
    return f"failed: {type(error).__name__}: {text}"[:200]
