"""A small made-up run, for tests of what reads one."""

from __future__ import annotations

from typing import Any

from benchmarks.schema import Device, Errors, Header, Results, Row, Spread


def header() -> Header:
    device = Device("cpu", "Some CPU", ["avx2"], 2, 16.0, None)
    return Header(
        created="2025-01-02T03:04:05+00:00",
        command="python -m benchmarks --preset quick",
        commit="0123456789ab",
        dirty=False,
        device=device,
        threads=2,
        versions={"torch": "2.13.0", "triton": None},
        isa={"fastcl": "avx2", "torch": "AVX2"},
        float32_matmul_precision="highest",
        gemm_tflops={"float32": 0.1},
        other_load=0.0,
    )


def row(contender: str = "fastcl", median: float = 1.0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "loss": "clip",
        "n": 8192,
        "m": 8192,
        "d": 512,
        "dtype": "float32",
        "phase": "forward+backward",
        "contender": contender,
        "backend": "cpu" if contender == "fastcl" else None,
        "status": "ok",
        "product": "float32",
        "flops": 8 * 8192 * 8192 * 512,
        "seconds": Spread(median, median * 0.9, median * 1.1, median * 0.8, median * 1.2, 9),
        "errors": Errors(2048, 2048, 1e-7, {"image_features": 1e-6}),
    } | changes
    case = f"{fields['loss']}-{fields['n']}x{fields['d']}-{fields['dtype']}"
    return Row(case=case, **fields)


def results(*rows: Row) -> Results:
    return Results(header(), list(rows))
