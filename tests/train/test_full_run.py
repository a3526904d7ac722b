"""The default run of every method, as `make demo` does it, and a short one on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcl.train.run import new_config, train
from tests.train.fixtures import ALL_METHODS


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_default_run_beats_raw_pixels_and_the_untrained_encoder(
    method: str, tmp_path: Path
) -> None:
    scores = train(new_config(method=method), tmp_path / method).scores
    trained = scores["trained encoder"]
    for other in ("raw pixels", "untrained encoder"):
        least = {"1": 0.20, "5": 0.08, "10": 0.05, "all": 0.03}
        for labels, margin in least.items():
            probe = scores[other].linear_probe[labels].mean
            assert trained.linear_probe[labels].mean > probe + margin
        assert trained.knn.mean > scores[other].knn.mean + 0.01
    if trained.zero_shot is not None:
        assert trained.zero_shot.mean > 0.95
        assert scores["untrained encoder"].zero_shot.mean < 0.3  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_short_run_on_cuda(method: str, precision: str, tmp_path: Path) -> None:
    config = new_config(method=method, device="cuda", precision=precision, epochs=20)
    outcome = train(config, tmp_path / "run")
    losses = [r["loss"] for r in outcome.folder.read_metrics() if r["event"] == "step"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert outcome.scores["trained encoder"].knn.mean > 0.9
