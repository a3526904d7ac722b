"""What is said of losses across ranks: gradients, counts, the model, and the page that shows it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastcl

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from benchmarks import gradients, peers, scaling, step_model  # noqa: E402
from benchmarks.cost_model import LOSSES, MODES, TWO_SIDED, Cost  # noqa: E402
from benchmarks.counting import Row  # noqa: E402
from benchmarks.device import RESULTS  # noqa: E402
from benchmarks.ranks import RankError, on_ranks  # noqa: E402
from benchmarks.reports import Report, load, save  # noqa: E402
from benchmarks.scaling_tables import bars, cost_of  # noqa: E402
from benchmarks.schema import OK, SchemaError  # noqa: E402
from benchmarks.subjects import (  # noqa: E402
    FASTCL,
    OURS,
    RESTATED,
    SUBJECTS,
    TWO_SIDED_SETTING,
)
from benchmarks.traffic import Product, bytes_sent, count, peak_bytes, products  # noqa: E402
from tests.benchmarks.results import header  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
PATIENCE = 60.0  # seconds, for processes on a busy machine
N, D = 33, 24  # odd, so that halves of a rank's rows differ
FOUR, TWO = torch.float32, torch.bfloat16


# ---- gradients ----


def test_our_gradients_are_those_of_one_process() -> None:
    """All losses, both modes, even and uneven batches, under DDP's mean on two ranks."""
    rows = gradients.tabulate([FASTCL], [2], PATIENCE)
    assert {(row.loss_name, row.setting) for row in rows} >= {(x, m) for x in OURS for m in MODES}
    assert {tuple(row.batch) for row in rows} == {gradients.EVEN[2], gradients.UNEVEN[2]}
    for row in rows:
        assert row.exact, row
        assert row.scale is not None


def test_a_peer_that_is_not_there_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(library: str) -> None:
        raise ModuleNotFoundError(f"No module named {library!r}")

    monkeypatch.setattr(peers, "load", absent)
    chosen = [i for i, subject in enumerate(SUBJECTS) if subject.library == "lightly"]
    (row,) = gradients.measure(0, chosen, [(4, 4)])
    assert row.status == "failed: ModuleNotFoundError: No module named 'lightly'"
    assert row.status in gradients.table([row])
    assert not row.exact


# ---- counting ----


def _collectives(rank: int) -> dict[str, int]:
    """Bytes that each is counted to send: rank 0's and, of what has a root (rank 0), all ranks'."""
    size = 3
    x, whole = torch.ones(5, 2), torch.ones(5 * size, 2)  # 40 and 120 bytes
    parts = list(whole.split(5))

    def exchange() -> None:
        left, right = (rank - 1) % size, (rank + 1) % size
        operations = [dist.P2POp(dist.isend, x, left), dist.P2POp(dist.irecv, x.clone(), right)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def to_others() -> None:
        sent = [[0, 1, 4], [2, 0, 3], [1, 1, 3]]  # rows; what stays counts nothing
        came = [row[rank] for row in sent]
        dist.all_to_all_single(x.new_empty(sum(came), 2), x, came, sent[rank])

    def with_gradient() -> None:
        own = x.clone().requires_grad_()
        torch.cat(peers.gather_with_gradient(own)).sum().backward()

    root = {"dst": 0} if rank else {"dst": 0, "gather_list": [x.clone() for _ in range(size)]}
    calls: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: dist.all_gather([x.clone() for _ in range(size)], x),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole.clone(), x),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(x.clone(), whole),
        "all_to_all_single": to_others,
        "all_reduce": lambda: dist.all_reduce(x.clone()),
        "broadcast": lambda: dist.broadcast(x.clone(), 0),
        "reduce": lambda: dist.reduce(x.clone(), 0),
        "gather": lambda: dist.gather(x, **root),
        "scatter": lambda: dist.scatter(x.clone(), None if rank else parts, 0),
        "send": exchange,
        "barrier": dist.barrier,
        "gathered, with gradient": with_gradient,
        "agreement": lambda: fastcl.distributed.row_counts(5, dist.group.WORLD),
    }
    return {name: sum(bytes_sent(call).values()) for name, call in calls.items()}


def test_known_collectives_are_counted_by_the_convention() -> None:
    first, *others = on_ranks(3, _collectives, timeout=PATIENCE)
    same = {
        "all_gather": 80,
        "all_gather_into_tensor": 80,
        "reduce_scatter_tensor": 80,
        "all_reduce": 54,  # 2 x 2 / 3 of 40, rounded up
        "send": 40,
        "barrier": 0,
        "gathered, with gradient": 160,
        "agreement": 48,
    }
    at_root = {"broadcast": 80, "reduce": 0, "gather": 0, "scatter": 80, "all_to_all_single": 40}
    assert first == same | at_root
    away = {"broadcast": 0, "reduce": 40, "gather": 40, "scatter": 0}
    assert others[0] == same | away | {"all_to_all_single": 40}
    assert others[1] == same | away | {"all_to_all_single": 16}


def _uncounted(rank: int) -> None:
    from torch.distributed._functional_collectives import all_reduce

    if rank == 0:
        bytes_sent(lambda: all_reduce(torch.ones(2), "sum", dist.group.WORLD))
    dist.barrier()  # where the other one waits until it is ended


def test_what_has_no_convention_is_refused_and_ends_all_ranks() -> None:
    with pytest.raises(RankError, match=r"rank 0: (.|\n)*nobody has said what"):
        on_ranks(2, _uncounted, timeout=PATIENCE)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_known_products_are_counted_within_operators(backend: str) -> None:
    u, v = (torch.nn.functional.normalize(torch.randn(48, 16), dim=1) for _ in range(2))
    u.requires_grad_()
    v.requires_grad_()
    work = count(lambda: fastcl.clip_loss(u, v, 10.0, backend=backend).backward(), 16)
    assert (work.flops, work.tiles, work.similarities) == (8 * 48 * 48 * 16, 2, 2 * 48 * 48)
    assert work.sent == {}
    assert products(lambda: torch.randn(2, 3, 4) @ torch.randn(2, 4, 5)) == [Product(3, 4, 5, 2)]
    assert products(lambda: torch.addmm(torch.randn(3, 5), torch.randn(3, 4), torch.randn(4, 5)))


# ---- counts against the model, and the bars ----


def _step(loss: str, dtype: torch.dtype, n: int = N, d: int = D, **how: Any) -> Callable[[], None]:
    image, text = torch.nn.functional.normalize(torch.randn(2, n, d), dim=2).to(dtype)
    image.requires_grad_()
    text.requires_grad_()
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))

    def step() -> None:
        if loss == TWO_SIDED:
            value: Tensor = peers.two_sided_clip(image, text, scale)
        else:
            value = OURS[loss](image, text, scale, bias, group=dist.group.WORLD, **how)
        value.backward()
        image.grad = text.grad = scale.grad = bias.grad = None

    return step


def _rows(rank: int, size: int) -> list[Row]:
    cases = [(loss, mode, TWO, TWO) for loss in LOSSES for mode in MODES]
    cases += [("clip", "gather", *dtypes) for dtypes in ((FOUR, FOUR), (FOUR, TWO), (TWO, FOUR))]
    cases += [("clip", TWO_SIDED, dtype, dtype) for dtype in (FOUR, TWO)]
    rows = []
    for loss, mode, dtype, wire in cases:
        theirs = mode == TWO_SIDED
        how = {} if theirs else {"mode": mode, "reduce_dtype": wire, "backend": "torch"}
        work = count(_step(mode if theirs else loss, dtype, **how), D)
        library = RESTATED if theirs else FASTCL
        setting = TWO_SIDED_SETTING if theirs else mode
        names = (str(x).removeprefix("torch.") for x in (dtype, wire))
        place = (size, [rank], N, D, OK)
        rows.append(Row(library, None, loss, setting, *names, *place, **asdict(work)))
    return rows


_SLOW = pytest.mark.slow  # (the committed file has them, too)


@pytest.mark.parametrize("size", [pytest.param(1, marks=_SLOW), pytest.param(2, marks=_SLOW), 3, 4])
def test_the_model_gives_the_counts(size: int) -> None:
    """Exactly, on every rank; and the towers are what the bars ask."""
    rows = [row for of_rank in on_ranks(size, _rows, size, timeout=PATIENCE) for row in of_rank]
    for row in rows:
        cost = cost_of(row)
        assert (row.bytes_sent, row.flops, row.similarities) == (
            cost.sent.total,
            cost.flops,
            cost.similarities,
        ), row
    if size == 1:
        assert not any(row.bytes_sent for row in rows)
        return
    found = {bar.title: bar for bar in bars(rows)}
    assert found["gather: arithmetic"].verdict == "met"
    assert found["gather, fp32 + fp32: bytes"].towers == 1 / 2
    assert found["gather, fp32 + bf16: bytes"].towers == 3 / 8
    assert found["gather, bf16 + fp32: bytes"].towers == 3 / 4
    assert found["gather, bf16 + bf16: bytes"].towers == 1 / 2
    # The rest is two numbers each way for each column, and the header.
    rest = (16 + 24 / N) / (2 * 4 * D)
    assert found["gather, bf16 + fp32: bytes"].figure == pytest.approx(3 / 4 + rest)


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 512), ("bfloat16", 768)])
def test_the_bars_at_real_sizes(dtype: str, dim: int) -> None:
    """By the model, which gives the counts: what statistics add to the towers is below 1%."""
    b = 4 if dtype == "float32" else 2
    for ranks in (2, 4, 1024):
        theirs = Cost("clip", TWO_SIDED, ranks, 512, dim, b, b)
        for wire, limit in ((4, 0.75), (2, 0.5)):
            cost = Cost("clip", "gather", ranks, 512, dim, b, wire)
            assert cost.flops * 3 == theirs.flops * 2
            assert cost.sent.towers <= limit * theirs.sent.total
            assert cost.sent.total <= 1.01 * limit * theirs.sent.total
            if dtype == "float32":
                assert cost.sent.total <= limit * theirs.sent.total


WIDE = (192, 512)  # rows and dimension: embeddings, beside which all else is small
WORKSPACE = 1 << 20  # bytes


def _peaks(rank: int) -> dict[tuple[str, str, torch.dtype], int]:
    found = {}
    for loss in step_model.LOSSES:
        for mode in MODES:
            for wire in (FOUR, TWO):
                how = {"mode": mode, "reduce_dtype": wire, "workspace": WORKSPACE}
                step = _step(loss, TWO, *WIDE, **how)
                step()  # connects the ranks
                found[loss, mode, wire] = peak_bytes(step)
    return found


def test_no_more_is_held_than_the_model_says() -> None:
    (peaks, *_) = on_ranks(3, _peaks, timeout=PATIENCE)
    for (loss, mode, wire), peak in peaks.items():
        step = step_model.Step(Cost(loss, mode, 3, *WIDE, 2, wire.itemsize))
        lines = 64 * 3 * WIDE[0]  # bytes of vectors, which the model leaves out
        assert peak <= step.held(native=False, workspace=WORKSPACE) + lines, (loss, mode, wire)


# ---- the page, and result files ----


def _printed(app: Any, *arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def _results(kind: str) -> Path:
    """The result file that the page names."""
    (name,) = set(re.findall(rf"benchmarks/results/({kind}-[\w.-]+\.json)", PAGE.read_text()))
    return RESULTS / name


def test_the_page_shows_what_the_commands_print() -> None:
    page = PAGE.read_text("utf-8")
    assert _printed(scaling.app, "model") in page
    printed = _printed(scaling.app, "table", str(_results("scaling")))
    tables = [part for part in printed.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    assert all(table.strip() in page for table in tables)


def test_the_committed_counts_are_the_models_and_the_restatement_is_faithful() -> None:
    rows = load(_results("scaling"), scaling.KIND, Row).rows
    ours = [row for row in rows if row.library in (FASTCL, RESTATED)]
    assert {row.ranks for row in ours} == {1, 2, 3, 4}
    for row in ours:
        for cost in (cost_of(row, rank) for rank in row.alike):
            counted = row.bytes_sent, row.flops, row.similarities
            assert counted == (cost.sent.total, cost.flops, cost.similarities), row
    real, restated = (
        {
            (row.embeddings, row.ranks, *row.alike): (row.bytes_sent, row.flops)
            for row in rows
            if row.library == library and row.family == "clip"
        }
        for library in ("open_clip", RESTATED)
    )
    assert real == restated


def test_memory_traffic_is_that_of_the_librarys_plan() -> None:
    step = step_model.Step(Cost("clip", "gather", 64, 16_384, 768, 2, 4))
    how: dict[str, Any] = {"dtype": TWO, "backend": "triton", "mode": "gather", "world_size": 64}
    plan = fastcl.explain("clip_loss", 16_384, 768, **how)
    assert plan.traffic / step.machine.memory_rate == pytest.approx(step.memory, rel=0.2)
    assert plan.flops == step.cost.flops


def test_files_read_back_and_others_are_refused(tmp_path: Path) -> None:
    row = gradients.Row("fastcl", None, "clip", "ring", [1, 2], OK, 1.0, 1.0, 1.0, None, 1.0)
    report = Report(gradients.KIND, header(), [row])
    path = save(report, tmp_path)
    assert re.fullmatch(r"gradients-v1-[\w-]+\.json", path.name)
    assert load(path, gradients.KIND, gradients.Row) == report
    assert "fastcl clip (ring)" in _printed(gradients.app, "--show", str(path))
    with pytest.raises(SchemaError, match="expected"):
        load(path, scaling.KIND, Row)
    path.write_text(path.read_text().replace('"cosine"', '"sine"'))
    with pytest.raises(SchemaError, match="sine"):
        load(path, gradients.KIND, gradients.Row)
