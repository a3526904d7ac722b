"""Runs cases and turns what was measured into rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.cases import BOTH, FORWARD, Case, Phase
from benchmarks.contenders import (
    COMPILED,
    EAGER_FORM,
    FASTCL,
    GEMMS,
    bytes_needed,
    failure_text,
    loss_contender,
    loss_function,
)
from benchmarks.device import available_bytes
from benchmarks.eager import LossFunction
from benchmarks.errors import Judge
from benchmarks.gemms import Replay, record, square_rate
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.memory import MemoryFailure, extra_bytes
from benchmarks.ours import backend_name
from benchmarks.schema import OK, Errors, Row
from benchmarks.timing import Contender, alternate, clock_for, paired_ratio, spread, warm_up

SETS = 3  # of inputs, rotated


@dataclass(frozen=True)
class Options:
    """What is measured of each case, and how."""

    contenders: tuple[str, ...]
    rounds: int
    backend: str = "auto"
    forward: bool = False
    memory: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    say: Callable[[str], None] = lambda _: None  # what it is doing
    done: Callable[[str], None] = lambda _: None  # which case is behind it


def machine_rates(cases: Iterable[Case], options: Options, size: int) -> dict[str, float]:
    """TFLOP/s of one large square product in float32 and in every dtype among the cases."""
    clock, rates = clock_for(options.device), {}
    for dtype in sorted({"float32"} | {case.dtype for case in cases}):
        options.say(f"machine's GEMM rate, {dtype}")
        rates[dtype] = square_rate(dtype, size, options.device, clock)
    return rates


def run_cases(cases: Sequence[Case], options: Options) -> tuple[list[Row], dict[str, float]]:
    """All rows, and the machine's GEMM rates: the best of before and after the cases."""
    size = min(4096, max(max(*case.matrix, case.d) for case in cases))
    before = machine_rates(cases, options, size)
    rows = []
    for i, case in enumerate(cases, 1):
        rows += run_case(case, options)
        options.done(f"[{i}/{len(cases)}] {case.name}")
    after = machine_rates(cases, options, size)
    rates = {dtype: max(rate, after[dtype]) for dtype, rate in before.items()}
    return [_of_machine(row, rates) for row in rows], rates


def _of_machine(row: Row, rates: dict[str, float]) -> Row:
    rate = rates.get(row.product or "") or rates[row.dtype]
    return dataclasses.replace(row, of_machine=row.tflops / rate if row.tflops else None)


def run_case(case: Case, options: Options) -> list[Row]:
    """All rows of a case, but for their share of the machine's rate."""
    sets = [make_inputs(case, seed, options.device) for seed in range(SETS)]
    functions, missing = _functions(case, options)
    rows = []
    for phase in (BOTH, FORWARD) if options.forward else (BOTH,):
        rows += _time(case, options, phase, sets, functions, missing)
    return _with_memory(case, options, _with_errors(case, options, rows, functions))


def _functions(case: Case, options: Options) -> tuple[dict[str, LossFunction], dict[str, str]]:
    """What each contender runs, and why some do not."""
    functions: dict[str, LossFunction] = {}
    missing: dict[str, str] = {}
    for name in options.contenders:
        if name == GEMMS:
            continue
        need, have = bytes_needed(name, case), available_bytes(options.device)
        if need > 0.8 * have:
            missing[name] = f"skipped: needs about {need >> 30} GiB of {have >> 30} available"
            continue
        try:
            function = loss_function(name, case, options.backend)
        except Exception as error:  # a peer that cannot be had is a row that says so
            missing[name] = failure_text(error)
            continue
        if function is not None:
            functions[name] = function
    return functions, missing


def _time(
    case: Case,
    options: Options,
    phase: Phase,
    sets: list[Inputs],
    functions: dict[str, LossFunction],
    missing: dict[str, str],
) -> list[Row]:
    contenders = [loss_contender(name, f, sets, phase) for name, f in functions.items()]
    contenders += [Contender(name, lambda _: None, failure=why) for name, why in missing.items()]
    replays: list[Replay] = []
    if GEMMS in options.contenders:
        options.say(f"{case.name}: noting the products")
        contenders.append(_gemm_contender(case, options, phase, sets, replays))
    options.say(f"{case.name}: warming up, {phase}")
    warm_up(contenders, len(sets), failure_text)
    options.say(f"{case.name}: timing, {phase}")
    clock = clock_for(options.device)
    seconds = alternate(contenders, len(sets), options.rounds, clock)
    for inputs in sets:
        inputs.clear_gradients()
    replay = replays[0] if replays else None
    return [_row(case, options, phase, contender, seconds, replay) for contender in contenders]


def _gemm_contender(
    case: Case, options: Options, phase: Phase, sets: list[Inputs], replays: list[Replay]
) -> Contender:
    """The bare GEMMs of fastcl's own walk, one replay for each input set."""
    function = loss_function(FASTCL, case, options.backend)
    assert function is not None
    backend = backend_name(options.backend, options.device)
    try:
        replays += [record(case, function, backend, inputs, phase) for inputs in sets]
    except Exception as error:  # its row says why
        return Contender(GEMMS, lambda _: None, failure=failure_text(error))
    return Contender(GEMMS, lambda index: replays[index]())


def _row(
    case: Case,
    options: Options,
    phase: Phase,
    contender: Contender,
    seconds: dict[str, list[float]],
    replay: Replay | None,
) -> Row:
    name = contender.name
    own = name in (FASTCL, GEMMS)  # these multiply as fastcl's products do
    product = (replay.operand_dtype if replay else None) if own else case.dtype
    flops = replay.flops if name == GEMMS and replay else case.floor_flops(phase)
    time = spread(seconds[name]) if name in seconds else None
    tflops = flops / time.median / 1e12 if time else None

    def ratio(other: str) -> float | None:
        known = name in seconds and other in seconds
        return paired_ratio(seconds[name], seconds[other]) if known else None

    return Row(
        case=case.name,
        loss=case.loss,
        n=case.n,
        m=case.m,
        d=case.d,
        dtype=case.dtype,
        phase=phase,
        contender=name,
        backend=backend_name(options.backend, options.device) if own else None,
        status=contender.failure or OK,
        product=product,
        flops=flops,
        seconds=time,
        tflops=tflops,
        of_gemms=ratio(GEMMS),
        of_eager=ratio(EAGER_FORM),
        note=_gemm_note(case, phase, replay) if name == GEMMS and replay else "",
    )


def _gemm_note(case: Case, phase: Phase, replay: Replay) -> str:
    rows, cols = max(replay.tiles)
    note = f"{replay.count} products over tiles of up to {rows} x {cols}"
    if replay.operand_dtype != case.dtype:
        note += f"; {case.dtype} multiplied as {replay.operand_dtype}"
    excess = replay.flops / case.floor_flops(phase)
    return note if abs(excess - 1) < 0.005 else f"{note}; {excess:.2f} of the floor's FLOP"


def _with_errors(
    case: Case, options: Options, rows: list[Row], functions: dict[str, LossFunction]
) -> list[Row]:
    """Errors against float64; not of compiled code, which would be compiled anew for the size."""
    options.say(f"{case.name}: errors against float64")
    judge = Judge(case, options.device)
    errors: dict[str, Errors] = {
        row.contender: judge.errors(functions[row.contender])
        for row in rows
        if row.status == OK and row.phase == BOTH and row.contender not in (COMPILED, GEMMS)
    }
    return [
        dataclasses.replace(row, errors=errors.get(row.contender) if row.phase == BOTH else None)
        for row in rows
    ]


def _with_memory(case: Case, options: Options, rows: list[Row]) -> list[Row]:
    """Peak extra memory of forward and backward, each contender in its own process."""
    if not options.memory:
        return rows
    measured = []
    for row in rows:
        if row.status == OK and row.phase == BOTH and row.contender != GEMMS:
            options.say(f"{case.name}: memory of {row.contender}")
            where = (options.backend, options.device, torch.get_num_threads())
            try:
                row = dataclasses.replace(row, extra_bytes=extra_bytes(case, row.contender, *where))
            except MemoryFailure as error:
                row = dataclasses.replace(row, note=f"memory {failure_text(error)}")
        measured.append(row)
    return measured
