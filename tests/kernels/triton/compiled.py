"""What Triton makes of every kernel, for architectures that need not be there.

    python -m tests.kernels.triton.compiled > tests/kernels/triton/compiled.csv

compiles the main routes ahead of time, with the attributes that the launcher would pass, and reads
registers, spills, shared memory and instructions from the machine code. The table is committed, so
that a change for the worse shows in review.
"""

from __future__ import annotations

import collections
import csv
import functools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcl.kernels.triton.normalize import (
    rows_at_a_time,
    rows_normalized,
    rows_normalized_gradient,
)
from fastcl.kernels.triton.owner import owned_gradient
from fastcl.kernels.triton.plan import ALIGNMENT, KEPT, OWNED_DIM, blocks_for, owner_blocks
from fastcl.kernels.triton.sigmoid import sigmoid
from fastcl.kernels.triton.softmax import gradient, statistics

NVIDIA = (80, 90, 100, 120)
AMD = "gfx942"
# What the hardware allows a program, in bytes of shared memory.
SHARED = {80: 163_840, 90: 232_448, 100: 232_448, 120: 101_376, AMD: 65_536}

_PLAIN = {"SCALES": 1, "ROW_BIAS": 0, "COL_BIAS": False, "IDS": False, "DIAGONAL": True}
_EVERY = {"SCALES": 2, "ROW_BIAS": 2, "COL_BIAS": True, "IDS": True, "DIAGONAL": True}
_PLAIN_OWNER = {
    "SCALES": 1, "OWN_BIAS": 0, "OTHER_BIAS": 0, "IDS": False, "DIAGONAL": True,
    "SCALED": True, "PRODUCT": True,
}  # fmt: skip
_BOTH, _ROWS = {"ROWS": True, "COLS": True}, {"ROWS": True, "COLS": False}
_STATISTICS = {"PAIRS": True, "KEPT": False, "KEEP": False}
_GRADIENT = {"KEPT": False, "SCALED": True, "ROW_GS": True}
_SIGMOID = {
    "PAIRS": True,
    "KEPT": False,
    "WEIGHTS": True,
    "LOSS": True,
    "GRADIENT": True,
    "ROW_GS": True,
}
_LARGE = {"ROW_G": False, "COL_G": False, "UNIT": False, "SPLIT": False}
_SMALL = {"ROW_G": True, "COL_G": True, "UNIT": True, "SPLIT": True}
ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "statistics": (statistics, _PLAIN | _BOTH | _STATISTICS),
    "statistics-kept": (statistics, _PLAIN | _ROWS | _STATISTICS | {"KEEP": True}),
    "statistics-made": (statistics, _PLAIN | _BOTH | _STATISTICS | {"KEPT": True}),
    "statistics-every": (statistics, _EVERY | _BOTH | _STATISTICS),
    "gradient": (gradient, _PLAIN | _BOTH | _GRADIENT | _LARGE),
    "gradient-kept": (gradient, _PLAIN | _ROWS | _GRADIENT | _LARGE | {"KEPT": True}),
    "gradient-split": (gradient, _PLAIN | _BOTH | _GRADIENT | _LARGE | {"SPLIT": True}),
    "gradient-every": (gradient, _EVERY | _BOTH | _GRADIENT | _SMALL),
    "sigmoid": (sigmoid, _PLAIN | _SIGMOID | _LARGE | {"ROW_BIAS": 1, "ROW_G": True}),
    "sigmoid-split": (sigmoid, _PLAIN | _SIGMOID | _LARGE | {"ROW_BIAS": 1, "SPLIT": True}),
    "sigmoid-made": (sigmoid, _PLAIN | _SIGMOID | _LARGE | {"ROW_BIAS": 1, "KEPT": True}),
    "sigmoid-every": (sigmoid, _EVERY | _SIGMOID | _SMALL),
}
_OWNER = _PLAIN_OWNER | {"OWN": True, "SPLIT": False, "UNIT": False, "LOSS": False, "SUM_G": False}
_OF_ROWS = {"TRANSPOSED": False, "SUM_GS": True}
_OF_COLS = {"TRANSPOSED": True, "SUM_GS": False}
_SOFTMAX = {"SIGMOID": False, "OTHER": True, "PAIRS": False}
_OF_LOSS = {"PAIRS": True, "LOSS": True, "SUM_G": True, "OTHER_BIAS": 0, "OWN_BIAS": 1}
_OWNER_SIGMOID = {"SIGMOID": True, "OWN": False, "OTHER": False, "PAIRS": False}
_ALL_OF_OWNER = {
    "SCALES": 2, "OWN_BIAS": 2, "OTHER_BIAS": 2, "IDS": True, "SUM_G": True, "UNIT": True,
    "SPLIT": True,
}  # fmt: skip
OWNER_ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "owner-rows": (owned_gradient, _OWNER | _OF_ROWS | _SOFTMAX),
    "owner-columns": (owned_gradient, _OWNER | _OF_COLS | _SOFTMAX),
    "owner-sigmoid-rows": (owned_gradient, _OWNER | _OF_ROWS | _OWNER_SIGMOID | _OF_LOSS),
    "owner-sigmoid-columns": (owned_gradient, _OWNER | _OF_COLS | _OWNER_SIGMOID),
    "owner-every": (owned_gradient, _OWNER | _OF_ROWS | _SOFTMAX | _ALL_OF_OWNER),
    "normalize": (rows_normalized, {}),
    "normalize-gradient": (rows_normalized_gradient, {}),
}
ROUTES |= OWNER_ROUTES
# What clip_loss and siglip_loss launch, for large embeddings and for small ones.
MAIN = ("statistics", "gradient", "sigmoid")
EMBEDDINGS = ("u", "v", "g_out", "own", "other", "x", "y", "g", "dx")  # pointers to what has D
NUMBERS = ("n", "m", "diagonal", "lines", "blocks", "blocks_of_part")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code, summed up."""

    route: str
    arch: str
    dtype: str
    dim: int
    registers: int
    spills: int  # instructions that store to or load from local memory
    shared: int
    matrix: str  # the matrix instruction
    copies: int  # asynchronous ones
    per_element: float  # instructions of a thread, other than of the products, per element of S


@functools.cache
def compiled(route: str, arch: int | str, dtype: str, dim: int) -> Compiled:
    """Compiles one route of one kernel for one architecture."""
    kernel, flags = ROUTES[route]
    padded = dim + -dim % ALIGNMENT  # as the launcher pads
    shape, options, elements = _blocks(kernel, flags, padded, dtype, arch)
    more = {"PRECISION": "tf32" if dtype == "fp32" else "ieee", "UPCAST": False}
    flags = flags | shape | more | {"D": padded, "D_OUT": dim, "FAST": dtype != "fp32"}
    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    binary = triton.compile(_source(kernel, flags, dtype, padded), target=target, options=options)
    elements //= options["num_warps"] * target.warp_size
    read = _amd if amd else _nvidia
    return Compiled(
        route, str(arch), dtype, dim, shared=binary.metadata.shared, **read(binary, elements)
    )


def _blocks(
    kernel: Any, flags: dict[str, Any], dim: int, dtype: str, arch: int | str
) -> tuple[dict[str, Any], dict[str, int], int]:
    """(what the launcher passes of the block, the compiler's options, elements of the block)."""
    if kernel in (rows_normalized, rows_normalized_gradient):
        shape = rows_at_a_time(dim)
        return shape, {"num_warps": 4, "num_stages": 3}, shape["ROWS"] * shape["COLS"]
    known = arch if isinstance(arch, int) else 0
    if kernel is owned_gradient:
        owner = owner_blocks(dim, known)
        shape = {"BLOCK_M": owner.m, "BLOCK_N": owner.n, "BLOCK_D": owner.d}
        options = {"num_warps": owner.warps, "num_stages": owner.stages}
        return shape, options, owner.m * owner.n
    split = flags.get("SPLIT", False)
    blocks = KEPT if flags.get("KEPT") else blocks_for(DTYPES[dtype], dim, known, split=split)
    shape = {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_K": blocks.k, "GROUP": blocks.group}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return shape, options, blocks.m * blocks.n


def _source(kernel: Any, flags: dict[str, Any], dtype: str, dim: int) -> ASTSource:
    """A launch's types and attributes: 16 divides pointers and row strides, and no other number."""
    names = [p.name for p in kernel.params]
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        kind = "*" + dtype if name in EMBEDDINGS else "*fp32"
        if name in flags:
            kind = "constexpr"
        elif name.endswith("_ids"):
            kind = "*i64"
        elif name in NUMBERS or name.startswith("stride"):
            kind = "i32"
        signature[name] = kind
        if kind.startswith("*") or (name.startswith("stride") and dim % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {k: flags[k] for k in names if k in flags}, attributes)


def _nvidia(binary: Any, elements: int) -> dict[str, Any]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.check_output([tool, what, file.name], text=True)
            for what in ("-res-usage", "-sass")
        )
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    count = collections.Counter(code)
    matrix = next((op for op in ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA") if count[op]), "none")
    copies = count["LDGSTS"] + count["UTMALDG"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count["STL"] + count["LDL"],
        "matrix": matrix,
        "copies": copies,
        "per_element": round((len(code) - count[matrix] - count["NOP"]) / elements, 1),
    }


def _amd(binary: Any, elements: int) -> dict[str, Any]:
    text = binary.asm["amdgcn"]
    code = re.findall(r"(?m)^\s+((?:[vs]|ds|buffer|global|scratch)_\w+)", text)
    matrix = sum(op.startswith("v_mfma") for op in code)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        "matrix": "v_mfma" if matrix else "none",
        "copies": 0,
        "per_element": round((len(code) - matrix) / elements, 1),
    }


def grid() -> list[tuple[str, int | str, str, int]]:
    """What the table holds: main routes everywhere, all routes on sm_90."""
    cases = [(route, arch, "bf16", 768) for arch in (*NVIDIA, AMD) for route in MAIN]
    others = [route for route in ROUTES if route not in MAIN and route not in OWNER_ROUTES]
    cases += [(route, 90, "bf16", 768) for route in others]
    largest = OWNED_DIM[2]
    cases += [(route, arch, "bf16", largest) for arch in NVIDIA for route in OWNER_ROUTES]
    cases += [(route, 90, "bf16", 64) for route in OWNER_ROUTES]
    cases += [(route, 90, "fp16", largest) for route in OWNER_ROUTES]
    cases += [(route, 90, dtype, 768) for dtype in ("fp16", "fp32") for route in MAIN]
    cases += [(route, 90, "bf16", dim) for dim in (64, 100, 4096) for route in MAIN]
    return cases


def table(rows: list[Compiled]) -> str:
    """The committed form."""
    lines = [f"# triton {triton.__version__}"]
    names = [f.name for f in fields(Compiled)]
    lines += [",".join(names)]
    lines += [",".join(str(asdict(row)[name]) for name in names) for row in rows]
    return "\n".join(lines) + "\n"


def read_table(text: str) -> tuple[str, list[dict[str, str]]]:
    """(Triton's version, the rows) of a committed table."""
    first, *rest = text.splitlines()
    return first.removeprefix("# triton "), list(csv.DictReader(rest))


if __name__ == "__main__":
    made = []
    for case in grid():
        made.append(compiled(*case))
        print(*case, file=sys.stderr)
    print(table(made), end="")
