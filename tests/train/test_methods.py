"""The four methods: that they learn, and what their losses see."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcl
from fastcl.train.captions import Captions
from fastcl.train.data import Batch, Dataset
from fastcl.train.methods import (
    METHODS,
    ImageText,
    Method,
    SigLip,
    StepOutput,
    build_method,
    register,
)
from fastcl.train.run import new_config
from tests.train.fixtures import ALL_METHODS, MakeTrainer, ignore


def test_the_table_has_the_four_methods() -> None:
    assert set(ALL_METHODS) <= set(METHODS)


@pytest.mark.parametrize("name", ALL_METHODS)
def test_the_loss_falls_within_a_few_steps(name: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(name, epochs=7)
    trainer.fit(ignore, ignore)
    losses = [row["loss"] for row in trainer.folder.read_metrics() if row["event"] == "step"]
    assert len(losses) == 28
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embeddings_are_unit_and_of_the_chosen_precision(
    name: str, precision: str, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(name, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = next(trainer.batches.epoch())
    method = trainer.method
    network = method.image_network if isinstance(method, ImageText) else method.network
    z = method.embed(network, batch.views[0])
    assert z.dtype == dtype
    tolerance = 2**-7 if precision == "bf16" else 1e-5
    assert (z.float().norm(dim=1) - 1).abs().max() < tolerance
    output = trainer.train_step(batch)
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


@pytest.mark.parametrize("name", ALL_METHODS)
def test_the_backends_agree(name: str, dataset: Dataset, captions: Captions) -> None:
    torch.manual_seed(0)
    outputs = []
    batch = some_batch(dataset, captions, name, n=48)
    for backend in ("auto", "reference"):
        config = new_config(method=name, backend=backend)
        outputs.append(build_method(config, dataset, captions)(batch))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-5)


def some_batch(dataset: Dataset, captions: Captions, name: str, n: int) -> Batch:
    images, labels = dataset.train_images[:n], dataset.train_labels[:n]
    views = tuple(
        (images + 0.1 * torch.randn_like(images)).clamp(0, 1) for _ in range(METHODS[name].views)
    )
    return Batch(views, captions.table()[labels, 0], labels)


def test_clip_drops_equal_classes_from_the_negatives(dataset: Dataset, captions: Captions) -> None:
    method = build_method(new_config(method="clip"), dataset, captions)
    assert isinstance(method, ImageText)
    batch = some_batch(dataset, captions, "clip", n=40)
    with torch.no_grad():
        image = method.embed(method.image_network, batch.views[0])
        text = method.embed(method.text_network, batch.tokens)  # type: ignore[arg-type]
        logits = image @ text.T / 0.07
        same = batch.ids[:, None] == batch.ids[None, :]
        logits = logits.masked_fill(same & ~torch.eye(40, dtype=torch.bool), -torch.inf)
        target = torch.arange(40)
        expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(method(batch).loss, expected, rtol=1e-4, atol=1e-5)


def test_published_initial_values(dataset: Dataset, captions: Captions) -> None:
    clip = build_method(new_config(method="clip"), dataset, captions)
    siglip = build_method(new_config(method="siglip"), dataset, captions)
    assert isinstance(clip, ImageText)
    assert isinstance(siglip, SigLip)
    assert clip.log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert siglip.log_scale.item() == pytest.approx(math.log(10))
    assert siglip.logit_bias.item() == -10.0


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_scale_learns_and_is_clamped_at_100(name: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(name)
    method = trainer.method
    assert isinstance(method, ImageText)
    stream = trainer.batches.epoch()
    before = method.log_scale.item()
    trainer.train_step(next(stream))
    assert method.log_scale.item() != before
    with torch.no_grad():
        method.log_scale.fill_(math.log(500.0))
    trainer.train_step(next(stream))
    assert method.log_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


@pytest.mark.parametrize("name", ALL_METHODS)
def test_initial_weights_depend_on_the_seed_alone(
    name: str, dataset: Dataset, captions: Captions
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_method(new_config(method=name, seed=1), dataset, captions).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = build_method(new_config(method=name, seed=1), dataset, captions).state_dict()
    third = build_method(new_config(method=name, seed=2), dataset, captions).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


def test_weight_decay_is_for_matrices_only(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("clip", weight_decay=0.5)
    matrices, others = trainer.optimizer.param_groups
    assert matrices["weight_decay"] == 0.5
    assert others["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert any(p is trainer.method.log_scale for p in others["params"])
    total = len(matrices["params"]) + len(others["params"])
    assert total == len(list(trainer.method.parameters()))


def test_a_new_method_needs_a_class_and_a_name(
    monkeypatch: pytest.MonkeyPatch, make_trainer: MakeTrainer
) -> None:
    monkeypatch.setitem(METHODS, "counting", Method)  # so that it is taken out again

    @register("counting")
    class Counting(Method):
        """A toy with a state of its own: it counts its steps."""

        views = 2
        defaults: ClassVar[dict[str, Any]] = {"temperature": 0.2}

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.register_buffer("steps", torch.tensor(0))
            self.steps: Tensor

        def forward(self, batch: Batch) -> StepOutput:
            query, key = (self.embed(self.encoder, view) for view in batch.views)
            loss = fastcl.info_nce(query, key.detach(), temperature=0.2)
            nothing = torch.zeros(())
            return StepOutput(loss, nothing, nothing, nothing)

        def after_step(self) -> None:
            self.steps += 1

    trainer = make_trainer("counting", epochs=1)
    trainer.fit(ignore, ignore)
    assert isinstance(trainer.method, Counting)
    assert trainer.method.steps == trainer.step == 4
    assert trainer.config.temperature == 0.2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_gradient_cache_changes_nothing(
    method: str, precision: str, make_trainer: MakeTrainer
) -> None:
    """But the order of sums: the first step's loss and gradients."""
    found = []
    for chunk in (0, 10):
        trainer = make_trainer(method, batch_size=64, cache_chunk=chunk, precision=precision)
        output = trainer.train_step(next(iter(trainer.batches.epoch())))
        grads = [p.grad.flatten() for p in trainer.method.parameters()]
        found.append((output.loss, torch.cat(grads)))
        assert trainer.method.cached is None
    (loss, grad), (cached_loss, cached_grad) = found
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    torch.testing.assert_close(cached_loss, loss, rtol=tolerance, atol=tolerance)
    assert (cached_grad - grad).norm() <= tolerance * grad.norm()
