from __future__ import annotations

import dataclasses

from benchmarks.bars import check
from benchmarks.schema import Errors, Results, Row
from benchmarks.tables import markdown
from tests.benchmarks.results import results, row


def _verdicts(run: Results) -> dict[str, tuple[float | None, str]]:
    return {bar.title: (bar.figure, bar.verdict) for bar in check(run)}


def _bf16(contender: str, error: float | None, **changes: object) -> Row:
    errors = Errors(2048, 2048, 1e-9, {"image_features": error})
    return row(contender, dtype="bfloat16", errors=errors, **changes)


def test_speed_and_memory_against_eager_and_gemms() -> None:
    verdicts = _verdicts(
        results(
            row("fastcl", 1.0, extra_bytes=40),
            row("eager", 2.5, extra_bytes=1000),
            row("gemms", 0.8),
        )
    )
    assert verdicts["clip float32: time / eager's"] == (0.4, "met")
    assert verdicts["clip float32: time / gemms's"] == (1.25, "missed")
    assert verdicts["clip float32: extra memory / eager's"] == (0.04, "met")
    assert not any(title.startswith("siglip") for title in verdicts)


def test_bf16_is_held_against_float32_and_eager_bf16() -> None:
    verdicts = _verdicts(
        results(row("fastcl", 1.0), _bf16("fastcl", 2e-3, median=0.5), _bf16("eager", 1e-3))
    )
    assert verdicts["clip: bfloat16's time / float32's"] == (0.5, "met")
    title = "clip bfloat16: error / eager's, worst of loss and gradients"
    assert verdicts[title] == (2.0, "missed")
    nan = _verdicts(results(_bf16("fastcl", None), _bf16("eager", 1e-3)))
    assert nan[title][1] == "missed"


def test_another_size_is_said_so() -> None:
    small = {"n": 1024, "m": 1024}
    verdicts = _verdicts(results(row("fastcl", 1.0, **small), row("eager", 4.0, **small)))
    assert verdicts["clip float32: time / eager's"] == (0.25, "met, but at 1024 x 512")


def test_a_gpu_run_has_no_cpu_bars() -> None:
    run = results(row(), row("eager"))
    gpu = dataclasses.replace(run.header.device, kind="cuda")
    assert check(dataclasses.replace(run, header=dataclasses.replace(run.header, device=gpu))) == []


def test_markdown_shows_every_contender_and_the_run() -> None:
    failed = row("compiled", status="failed: no compiler", seconds=None, errors=None)
    text = markdown(results(row(), row("eager", 3.0), failed))
    assert "| fastcl | 1000 (900 to 1100) |" in text
    assert "| compiled | failed: no compiler |" in text
    assert "commit 0123456789ab" in text
    assert "| clip float32: time / eager's | 0.333 | 0.45 | met |" in text
