"""FLOP counts against numbers worked out by hand, and against what fastcl really multiplies."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import BOTH, FORWARD, LOSSES, PRESETS, Case, Phase, make_case
from benchmarks.gemms import NoProducts, record
from benchmarks.inputs import make_inputs
from benchmarks.ours import backend_name, fastcl_loss

CPU = torch.device("cpu")

# One product over the N x M matrix is 2 N M D: at 8192 square and D = 512, 68,719,476,736.
BY_HAND = [
    (make_case("clip", 8192, 512, "float32"), 274_877_906_944, 68_719_476_736),
    (make_case("siglip", 8192, 512, "float32"), 206_158_430_208, 68_719_476_736),
    (make_case("info_nce", 8192, 512, "bfloat16"), 206_158_430_208, 68_719_476_736),
    # 4096 pairs: 8192 square, and half of it for each of clip's four products.
    (make_case("nt_xent", 4096, 512, "float32"), 137_438_953_472, 34_359_738_368),
    # 256 x 65,536 x 128: similarities and the query's gradient, 2 * 4,294,967,296.
    (make_case("moco", 256, 128, "float32"), 8_589_934_592, 4_294_967_296),
]


@pytest.mark.parametrize(("case", "both", "forward"), BY_HAND, ids=lambda x: getattr(x, "name", ""))
def test_floors_by_hand(case: Case, both: int, forward: int) -> None:
    assert case.floor_flops(BOTH) == both
    assert case.floor_flops(FORWARD) == forward


@pytest.mark.parametrize("phase", [BOTH, FORWARD])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fastcl_multiplies_no_more_than_its_floor(loss: str, dtype: str, phase: Phase) -> None:
    case = make_case(loss, 96, 16, dtype, m=3000)
    function = fastcl_loss(loss)
    inputs = make_inputs(case, 0, CPU)
    replay = record(case, function, backend_name("auto", CPU), inputs, phase)
    floor = case.floor_flops(phase)
    if loss == "nt_xent":  # 192 rows are one tile, which is made whole: halves become wholes
        whole = 2 * 192 * 192 * 16
        floor = whole if phase == FORWARD else 3 * whole  # H is symmetric: one gradient product
    assert replay.flops == floor
    assert replay.tiles
    assert not inputs.gradients()


def test_a_replay_makes_the_products_that_were_noted() -> None:
    """sigmoid's single pass: what the replay leaves in the buffers is made of its tile alone."""
    case = make_case("siglip", 40, 8, "float32")
    inputs = make_inputs(case, 0, CPU)
    replay = record(case, fastcl_loss("siglip"), backend_name("auto", CPU), inputs)
    u, v, *_ = (x.detach() for x in inputs.arguments())
    first, second = replay(), replay()
    made = sorted((x.view(40, 8) for x in first.values()), key=lambda x: float(x.sum()))
    s = u @ v.T  # with no loss between the products, G is the tile of similarities
    expected = sorted((s @ v, s.T @ u), key=lambda x: float(x.sum()))
    for got, want in zip(made, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_backend_without_products_is_said_so() -> None:
    case = make_case("clip", 8, 4, "float32")
    inputs = make_inputs(case, 0, CPU)
    with pytest.raises(NoProducts, match="reference"):
        record(case, fastcl_loss("clip", "reference"), "reference", inputs)


def test_presets_hold_the_cases_of_the_bars() -> None:
    names = {case.name for case in PRESETS["default"].cases}
    assert {"clip-8192x512-float32", "siglip-8192x512-bfloat16"} <= names
    assert "moco-256x65536x128-float32" in names
    for preset in PRESETS.values():
        assert len({case.name for case in preset.cases}) == len(preset.cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("triplet", 8, 8, 4, "float32"), "loss 'triplet' is not known"),
        (("clip", 8, 8, 4, "int8"), "dtype 'int8' is not known"),
        (("clip", 8, 9, 4, "float32"), "clip is square: M is 9, expected N = 8"),
        (("clip", 0, 0, 4, "float32"), "must be positive"),
    ],
)
def test_wrong_cases_are_refused(arguments: tuple[str, int, int, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(*arguments)
