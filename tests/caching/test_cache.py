"""A cached step is the step without a cache: loss and all gradients."""

from __future__ import annotations

import copy
import functools
import random
import re
import warnings
from collections import UserDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import fastcl

N, D = 24, 8
CHUNKS = [1, 5, 8, 23, 24, 100]


class Text(nn.Module):
    """A transformer whose inputs are a tokenizer's: two tensors by name, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.2, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, D)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Any = None,
        pool: str = "no",
    ) -> Tensor:
        assert pool in ("no", "mean")
        hidden = self.layers(self.tokens(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(hidden.mean(dim=1))


def image_encoder(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(10, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, D)
    return nn.Sequential(*layers).double()


def text_encoder(dropout: bool = False) -> nn.Module:
    torch.manual_seed(2)
    encoder = Text().double()
    return encoder.train(dropout)


def images(n: int = N) -> Tensor:
    return torch.randn(n, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def texts(n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 30, (n, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(n, 6, dtype=torch.int64)}


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, rtol=tolerance, atol=tolerance)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))


def eager_infonce(u: Tensor, v: Tensor, scale: Scale) -> Tensor:
    logits = scale.log.exp() * F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T
    return F.cross_entropy(logits, torch.arange(len(u)))


LOSSES: dict[str, Callable[[Tensor, Tensor, Scale], Tensor]] = {
    "clip": lambda u, v, s: fastcl.clip_loss(u, v, s.log.exp(), normalize=True),
    "siglip": lambda u, v, s: fastcl.siglip_loss(u, v, s.log.exp(), s.bias, normalize=True),
    "nt_xent": lambda u, v, s: fastcl.nt_xent(u, v, temperature=1 / s.log.exp(), normalize=True),
    "info_nce": lambda u, v, s: fastcl.info_nce(
        u, v, temperature=1 / s.log.exp(), normalize=True, reduction="none"
    ).square().mean(),
    "eager": eager_infonce,
}  # fmt: skip


def step(loss: str, chunk: int | None, **options: Any) -> tuple[float, list[Tensor]]:
    """Loss and gradients of two encoders and the loss's own parameters, at a fixed seed."""
    a, b, scale = image_encoder(), text_encoder(), Scale()
    torch.manual_seed(9)
    if chunk is None:
        value = LOSSES[loss](a(images()), b(**texts()), scale)
        value.backward()
    else:
        with fastcl.grad_cache(chunk_size=chunk, **options) as cached:
            value = LOSSES[loss](cached(a, images()), cached(b, **texts()), scale)
            value.backward()
    return value.item(), gradients(a, b, scale)


@pytest.mark.parametrize("keep", [0, 1, 2, 50])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_as_without_a_cache(loss: str, chunk: int, keep: int) -> None:
    expected, right = step(loss, None)
    value, found = step(loss, chunk, keep=keep)
    assert value == pytest.approx(expected, rel=1e-12)
    same(found, right)


@pytest.mark.parametrize("chunk", [5, 24])
def test_as_an_object(chunk: int) -> None:
    a, b, scale = image_encoder(), text_encoder(), Scale()
    cached = fastcl.GradCache([a, b], LOSSES["clip"], chunk_size=[chunk, 7])
    value = cached(images(), texts(), s=scale)
    expected, right = step("clip", None)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert not value.requires_grad
    same(gradients(a, b, scale), right)


def test_one_encoder_for_both_and_two_steps_in_a_row() -> None:
    """Gradients add up, as without a cache."""
    ours, theirs = image_encoder(), image_encoder()
    for seed in (1, 2):
        views = [images() + 0.1 * seed * k for k in range(2)]
        fastcl.GradCache([ours, ours], fastcl.losses.NTXentLoss(normalize=True), 5)(*views)
        z0, z1 = (theirs(view) for view in views)
        fastcl.nt_xent(z0, z1, normalize=True).backward()
        same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_dropout_is_the_same_in_both_passes(keep: int) -> None:
    """The gradient is that of the loss that was returned: a finite difference at a fixed seed."""
    encoder = image_encoder(dropout=0.4)

    def loss(with_gradient: bool) -> float:
        torch.manual_seed(7)
        cache = fastcl.grad_cache(chunk_size=5, keep=keep)
        with cache as cached:
            z0, z1 = (cached(encoder, images() * s) for s in (1.0, 1.1))
            value = fastcl.nt_xent(z0, z1, normalize=True)
            value.backward()
        if not with_gradient:
            encoder.zero_grad()
        return value.item()

    loss(True)
    weight = encoder[0].weight
    direction = torch.randn(weight.shape, dtype=weight.dtype)
    derivative = (weight.grad * direction).sum().item()
    eps, moved = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * eps * direction
        moved.append(loss(False))
        with torch.no_grad():
            weight -= sign * eps * direction
    assert derivative == pytest.approx((moved[0] - moved[1]) / (2 * eps), rel=1e-6)


def test_random_numbers_go_on_as_if_nothing_had_run_again() -> None:
    encoder, after = image_encoder(dropout=0.3), []
    for keep in (0, 5):
        torch.manual_seed(3)
        with fastcl.grad_cache(chunk_size=8, keep=keep) as cached:
            z = cached(encoder, images())
            fastcl.info_nce(z, z.flip(1), normalize=True).backward()
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_an_outer_factor_reaches_the_gradients() -> None:
    right = [3.5 * grad for grad in step("clip", None)[1]]
    a, b, scale = image_encoder(), text_encoder(), Scale()
    with fastcl.grad_cache(chunk_size=7) as cached:
        value = LOSSES["clip"](cached(a, images()), cached(b, **texts()), scale)
        (3.5 * value).backward()
    same(gradients(a, b, scale), right)


def test_a_frozen_tower() -> None:
    a, b, scale = image_encoder(), text_encoder().requires_grad_(False), Scale()
    with fastcl.grad_cache(chunk_size=7) as cached:
        text = cached(b, **texts())
        assert not text.requires_grad
        LOSSES["clip"](cached(a, images()), text, scale).backward()
    same(gradients(a, scale), step("clip", None)[1][:6] + step("clip", None)[1][-1:])


def test_inputs_that_want_a_gradient() -> None:
    x, y = images().requires_grad_(), images().requires_grad_()
    encoder = image_encoder()
    with fastcl.grad_cache(chunk_size=7) as cached:
        z = cached(encoder, x)
        fastcl.info_nce(z, z.flip(0), normalize=True).backward()
    z = encoder(y)
    fastcl.info_nce(z, z.flip(0), normalize=True).backward()
    same([x.grad], [y.grad])
    with (
        pytest.raises(ValueError, match="comes from a computation that wants a gradient"),
        fastcl.grad_cache(chunk_size=7) as cached,
    ):
        cached(encoder, 2 * x)


def test_without_gradients() -> None:
    encoder = image_encoder()
    with torch.no_grad(), fastcl.grad_cache(chunk_size=7) as cached:
        z = cached(encoder, images())
    assert not z.requires_grad
    torch.testing.assert_close(z, encoder(images()).detach())


# ---- mixed precision ----


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_autocast(keep: int) -> None:
    """The bits of the same by hand, with every chunk's graph kept.

    (Not those of the whole batch at once, whose sums over rows round elsewhere.)
    """
    bf16 = {"device_type": "cpu", "dtype": torch.bfloat16}
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, D))
    theirs, x = copy.deepcopy(ours), images().float()
    with fastcl.grad_cache(chunk_size=6, keep=keep) as cached:
        with torch.autocast(**bf16):
            z = cached(ours, x)
            assert z.dtype == torch.bfloat16
            loss = fastcl.info_nce(z, z.flip(0), normalize=True)
        loss.backward()
    parts = []
    for part in x.split(6):
        with torch.autocast(**bf16):
            parts.append(theirs(part))
    leaf = torch.cat([part.detach() for part in parts]).requires_grad_()
    expected = fastcl.info_nce(leaf, leaf.flip(0), normalize=True)
    expected.backward()
    order = range(len(parts)) if keep == 0 else [*range(max(0, 4 - keep), 4), *range(4 - keep)]
    for i in order:
        parts[i].backward(leaf.grad[6 * i : 6 * i + 6])
    assert torch.equal(loss, expected)
    assert len(gradients(ours)) == 4  # none is lost to casts that were made without a graph
    for found, right in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(found, right)


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    a, b, scale = image_encoder(), text_encoder(), Scale()
    cached = fastcl.GradCache([a, b], LOSSES["clip"], 7, scaler=scaler)
    value = cached(images(), texts(), s=scale)
    expected, right = step("clip", None)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    same(gradients(a, b, scale), [2.0**10 * grad for grad in right])


def test_compiled_encoders() -> None:
    a, b, scale = image_encoder(), text_encoder(), Scale()
    compiled = torch.compile(a, backend="eager")
    with fastcl.grad_cache(chunk_size=8) as cached:
        LOSSES["clip"](cached(compiled, images()), cached(b, **texts()), scale).backward()
    same(gradients(a, b, scale), step("clip", None)[1])


# ---- inputs of any nesting ----


@dataclass
class Batch:
    pixels: Tensor
    names: list[str]
    extra: Any = None


class Tokens(UserDict):
    """As a tokenizer's batch: a mapping with methods."""

    def width(self) -> int:
        return int(self["input_ids"].shape[1])


SEEN: list[Any] = []


def reads(batch: Any, *more: Any, **options: Any) -> Tensor:
    """An encoder that looks at what it is given."""
    SEEN.append((batch, more, options))
    if isinstance(batch, Batch):
        assert len(batch.names) == len(batch.pixels)
        return batch.pixels
    if isinstance(batch, Tokens):
        assert batch.width() == 6
        return batch["input_ids"].double() + batch["attention_mask"]
    if isinstance(batch, (list, tuple)):
        return batch[0]["a"] * batch[1]
    return batch


def nested() -> list[Any]:
    x = images().requires_grad_()
    names = [f"image {i}" for i in range(N)]
    return [
        (x, (), {}),
        (Batch(x, names, {"more": torch.zeros(N, 2)}), (), {}),
        ([{"a": x, "b": "text"}, torch.tensor(2.0)], (names, None), {"flag": True}),
        (({"a": x}, 3), ((x, names),), {"deep": [{"er": x}]}),
    ]


@pytest.mark.parametrize("case", range(4))
def test_nested_inputs(case: int) -> None:
    args, more, options = nested()[case]
    SEEN.clear()
    with fastcl.grad_cache(chunk_size=10) as cached:
        z = cached(reads, args, *more, **options)
        assert z.shape[0] == N
        z.sum().backward()
    sizes = [len(reads(batch, *rest)) for batch, rest, _ in list(SEEN)]
    assert sizes == [10, 10, 4, 10, 10]  # the last chunk's graph is kept
    for _, _, given in SEEN[:5]:
        assert given.keys() == options.keys()


def test_a_tokenizers_batch() -> None:
    tokens = Tokens(texts())
    seen = []
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)

    def encode(batch: Tokens, names: list[str]) -> Tensor:
        seen.append((type(batch), len(names), batch.width()))
        return batch["input_ids"] * weight

    with fastcl.grad_cache(chunk_size=10, keep=0) as cached:
        cached(encode, tokens, [str(i) for i in range(N)]).sum().backward()
    assert seen[:3] == [(Tokens, 10, 6), (Tokens, 10, 6), (Tokens, 4, 6)]
    torch.testing.assert_close(weight.grad, tokens["input_ids"].sum(dim=0).double())
    assert len(tokens["input_ids"]) == N


def test_only_keyword_arguments_and_an_unused_column() -> None:
    """The kwargs-only inputs and unused columns that trip others."""
    b = text_encoder()
    more = {"token_type_ids": torch.zeros(N, 6, dtype=torch.int64), "pool": "mean"}
    value = fastcl.GradCache([b], lambda z: fastcl.info_nce(z, z.flip(1), normalize=True), 7)
    value(texts() | more)
    other = text_encoder()
    z = other(**texts())
    fastcl.info_nce(z, z.flip(1), normalize=True).backward()
    same(gradients(b), gradients(other))


# ---- what cannot be exact, and wrong use ----


def test_batch_norm_is_named() -> None:
    encoder = nn.Sequential(nn.Linear(10, D), nn.BatchNorm1d(D)).double()
    with (
        pytest.warns(fastcl.caching.NotExact, match="1: BatchNorm1d normalises over"),
        fastcl.grad_cache(chunk_size=8) as cached,
    ):
        cached(encoder, images()).sum().backward()
    with (
        pytest.raises(ValueError, match="strict=True refuses"),
        fastcl.grad_cache(chunk_size=8, strict=True) as cached,
    ):
        cached(encoder, images())
    with fastcl.grad_cache(chunk_size=8, strict=True) as cached:
        cached(copy.deepcopy(encoder).eval(), images()).sum().backward()


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True, None])
def test_bad_chunk_sizes(chunk: Any) -> None:
    with pytest.raises(ValueError, match=r"chunk_size is .*; expected a number of rows"):
        fastcl.grad_cache(chunk_size=chunk)


def test_a_loss_that_ignores_an_encoder() -> None:
    cached = fastcl.GradCache(
        [image_encoder(), text_encoder()],
        lambda z, _: fastcl.info_nce(z, z.flip(1), normalize=True),
        8,
    )
    with pytest.raises(RuntimeError, match="the embeddings of Text have no gradient at the end"):
        cached(images(), texts())


def test_wrong_use() -> None:
    a, b = image_encoder(), text_encoder()
    cached = fastcl.GradCache([a, b], LOSSES["clip"], 8)
    with pytest.raises(ValueError, match="the encoders' inputs have 24, 23 rows"):
        cached(images(), texts(23), s=Scale())
    with pytest.raises(ValueError, match="1 inputs for 2 encoders"):
        cached(images(), s=Scale())
    with pytest.raises(ValueError, match="chunk_size has 1 numbers for 2 encoders"):
        fastcl.GradCache([a, b], LOSSES["clip"], [8])
    with pytest.raises(TypeError, match=r"returned tuple; expected a tensor.*embeddings="):
        fastcl.GradCache([lambda x: (x, x)], lambda z: z.sum(), 8)(images())
    with pytest.raises(ValueError, match=r"shape \[\] for a chunk of 8 rows"):
        fastcl.GradCache([lambda x: x.sum()], lambda z: z.sum(), 8)(images())
    with pytest.raises(TypeError, match="no tensor with rows"):
        fastcl.GradCache([a], lambda z: z.sum(), 8)("text")
    with pytest.raises(ValueError, match=r"inputs.* differ in their number of rows"):
        fastcl.GradCache([lambda x, y: x], lambda z: z.sum(), 8)([images(), images(3)])
    with pytest.raises(RuntimeError, match="encode inside the block"):
        fastcl.grad_cache(8)(a, images())


def test_an_error_in_the_block_leaves_no_gradients() -> None:
    encoder = image_encoder()

    def loss(z: Tensor) -> Tensor:
        z.sum().backward()
        raise KeyError

    with pytest.raises(KeyError):
        fastcl.GradCache([encoder], loss, 8)(images())
    assert gradients(encoder) == []


def test_embeddings_are_picked() -> None:
    encoder = image_encoder()
    cached = fastcl.GradCache(
        [lambda x: {"out": encoder(x)}],
        lambda z: z.square().sum(),
        8,
        embeddings=lambda d: d["out"],
    )
    cached(images())
    other = image_encoder()
    other(images()).square().sum().backward()
    same(gradients(encoder), gradients(other))


def test_activations_of_one_chunk_are_alive_at_a_time() -> None:
    """Counted by what autograd saves, unlike the process's peak, exactly."""
    alive, most = 0, 0

    def pack(x: Tensor) -> Any:
        nonlocal alive, most
        alive += x.numel()
        most = max(most, alive)

        class Kept:
            value = x

            def __del__(self) -> None:
                nonlocal alive
                alive -= x.numel()

        return Kept()

    peaks = []
    encoder = nn.Sequential(
        *(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(8))
    ).double()
    for n in (8, 64):
        alive = most = 0
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.value),
            fastcl.grad_cache(chunk_size=8) as cached,
        ):
            z = cached(encoder, images(n))
            z.sum().backward()
        peaks.append(most)
    assert peaks[1] <= 1.05 * peaks[0]


def test_checkpoints_within_an_encoder() -> None:
    encoder = image_encoder(dropout=0.3)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(encoder, x, use_reentrant=False)

    found = []
    for encode in (encoder, checkpointed):
        torch.manual_seed(5)
        encoder.zero_grad()
        with fastcl.grad_cache(chunk_size=7) as cached:
            z = cached(encode, images())
            fastcl.info_nce(z, z.flip(1), normalize=True).backward()
        found.append(gradients(encoder))
    same(*found)


def test_the_page_runs() -> None:
    """docs/caching.md, with the gradients of the step without a cache."""
    page = (Path(__file__).parents[2] / "docs" / "caching.md").read_text("utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, "caching.md", "exec"), names)
    encoders = [names["image_encoder"], names["text_encoder"]]
    found = gradients(*encoders)
    for encoder in encoders:
        encoder.zero_grad()
    features = [encode(names[x]) for encode, x in zip(encoders, ("images", "texts"), strict=True)]
    loss = fastcl.clip_loss(*features, logit_scale=14.3, normalize=True)
    loss.backward()
    assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    same(found, gradients(*encoders), tolerance=1e-5)


# ---- a budget in place of chunk sizes ----


@pytest.mark.parametrize("rows", [1, 7, 24])
def test_activations_are_counted(rows: int) -> None:
    """By hand: a linear layer saves its input, which is not counted; GELU its input; and so on."""
    encoder = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, D)).double()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert fastcl.caching.activation_bytes(encoder, images(rows)) == 8 * 16 * rows
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert fastcl.caching.activation_bytes(encoder, images(rows)) == 8 * 16 * rows


def test_chunks_fit_a_budget() -> None:
    encoder = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, D)).double()
    row = 8 * 16
    assert fastcl.caching.fitting_rows(encoder, 5 * row, images()) == (5, 1)
    assert fastcl.caching.fitting_rows(encoder, 60 * row, images()) == (24, 2)
    with pytest.raises(ValueError, match=f"one row's activations are about {row}"):
        fastcl.caching.fitting_rows(encoder, row - 1, images())
    for budget in (0, 2.5, True):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            fastcl.caching.fitting_rows(encoder, budget, images())


@pytest.mark.parametrize("rows", [3, 8, 60])
def test_a_budget_is_as_exact(rows: int) -> None:
    a, b, scale = image_encoder(), text_encoder(), Scale()
    each = [
        fastcl.caching.activation_bytes(a, images(1)),
        fastcl.caching.activation_bytes(b, **texts(1)),
    ]
    cached = fastcl.GradCache([a, b], LOSSES["clip"], memory_budget=2 * rows * max(each))
    value = cached(images(), texts(), s=scale)
    expected, right = step("clip", None)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    same(gradients(a, b, scale), right)
    size = cached.chunk_sizes[1]
    assert fastcl.caching.activation_bytes(b, **texts(size)) <= rows * max(each)
    assert size == N or fastcl.caching.activation_bytes(b, **texts(size + 2)) > rows * max(each)


def test_a_budget_or_a_size() -> None:
    with pytest.raises(ValueError, match=r"chunk_size is 16\.0; expected a number of rows"):
        fastcl.GradCache([image_encoder()], LOSSES["clip"], 16.0)
    for given in ({}, {"chunk_size": 3, "memory_budget": 1 << 20}):
        with pytest.raises(ValueError, match="give chunk_size or memory_budget, one of the two"):
            fastcl.GradCache([image_encoder()], LOSSES["clip"], **given)
    with pytest.raises(ValueError, match="keep is -1; expected a number of chunks"):
        fastcl.grad_cache(8, keep=-1)


# ---- what made other caches silently wrong ----


def whole_step(encode: Callable[..., Tensor], *inputs: Any, chunk: int | None = 7) -> None:
    """A step of one encoder, with or without a cache."""
    if chunk is None:
        z = encode(*inputs)
        fastcl.info_nce(z, z.flip(1), normalize=True).backward()
        return
    with fastcl.grad_cache(chunk_size=chunk) as cached:
        z = cached(encode, *inputs)
        fastcl.info_nce(z, z.flip(1), normalize=True).backward()


def test_embeddings_may_go_into_another_encoder() -> None:
    """A projector behind a backbone, both cached, both with a loss."""
    found = []
    for chunk in (5, None):
        backbone, projector = image_encoder(), nn.Linear(D, D).double()
        projector.load_state_dict({"weight": torch.eye(D) + 0.1, "bias": torch.ones(D)})
        with fastcl.grad_cache(chunk_size=chunk or N) as cached:
            encode = cached if chunk else (lambda module, x: module(x))
            h = encode(backbone, images())
            z = encode(projector, h)
            (fastcl.info_nce(z, h, normalize=True) + h.square().sum()).backward()
        found.append(gradients(backbone, projector))
    same(*found)


def test_modes_are_those_of_the_first_pass() -> None:
    encoder, found = image_encoder(dropout=0.5), []
    for chunk in (5, None):
        encoder.zero_grad()
        with fastcl.grad_cache(chunk_size=chunk or N) as cached:
            z = cached(encoder.eval(), images()) if chunk else encoder.eval()(images())
            encoder.train()
            fastcl.info_nce(z, z.flip(1), normalize=True).backward()
        assert encoder[3].training
        found.append(gradients(encoder))
    same(*found)


def test_pythons_and_numpys_random_numbers_too() -> None:
    """Checked by what comes out: the second run's embeddings are the first's."""
    encoder = image_encoder()

    def dropping(x: Tensor) -> Tensor:
        return encoder(x * (random.random() < 0.5) + np.random.rand())  # noqa: NPY002

    with warnings.catch_warnings():
        warnings.simplefilter("error", fastcl.caching.NotExact)
        whole_step(dropping, images())


def in_place(x: Tensor) -> Tensor:
    return x.mul_(2.0) * torch.ones(10, dtype=x.dtype, requires_grad=True)


class Counting(nn.Linear):
    """An encoder whose buffer changes what it computes."""

    def __init__(self) -> None:
        super().__init__(10, D)
        self.register_buffer("factor", torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.factor.mul_(0.9)
        return super().forward(x) * self.factor


@pytest.mark.parametrize("encode", [in_place, Counting()], ids=["inputs", "buffers"])
def test_an_encoder_that_changes_something_is_noticed(encode: Any) -> None:
    with pytest.warns(fastcl.caching.NotExact, match="gave other embeddings when it was run again"):
        whole_step(encode, images())
    cache = fastcl.GradCache([encode], lambda z: z.square().sum(), 7, strict=True)
    with pytest.raises(RuntimeError, match="strict=True refuses"):
        cache(images())


def wrapped(module: nn.Module) -> list[Callable[..., Tensor]]:
    return [module, module.forward, functools.partial(module), lambda x: module(x)]


@pytest.mark.parametrize("way", range(4))
def test_modules_are_found_within_functions(way: int) -> None:
    inexact = [
        nn.Sequential(nn.Linear(10, D), nn.BatchNorm1d(D)),
        nn.BatchNorm1d(10, track_running_stats=False).eval(),
        nn.utils.spectral_norm(nn.Linear(10, D)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(10, D)),
    ]
    for module in inexact:
        encode = wrapped(module.double())[way]
        with pytest.raises(ValueError, match="is not exact"):
            fastcl.GradCache([encode], lambda z: z.sum(), 8, strict=True)(images())


class Stored(MutableMapping):
    """A mapping with storage of its own, which a shallow copy shares."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclass
class Prepared:
    """What is computed once from what is given."""

    x: Tensor
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.x + 1
        self.doubled = 2 * self.x


def test_batches_are_left_as_they_are() -> None:
    encoder, stored, prepared = image_encoder(), Stored(x=images()), Prepared(images())
    whole_step(lambda batch: encoder(batch["x"]), stored)
    assert torch.equal(stored["x"], images())
    encoder.zero_grad()
    whole_step(lambda batch: encoder(batch.x + batch.doubled), prepared)
    found = gradients(encoder)
    encoder.zero_grad()
    whole_step(lambda batch: encoder(batch.x + batch.doubled), prepared, chunk=None)
    same(found, gradients(encoder))


def test_texts_alone_and_sizes_that_are_no_rows() -> None:
    table = nn.Embedding(N, D).double()
    names, seen = [str(i) for i in range(N)], []

    def encode(texts: list[str], size: tuple[int, int] = (0, 0)) -> Tensor:
        seen.append((len(texts), size))
        return table(torch.tensor([int(text) for text in texts]))

    whole_step(encode, names)
    assert [n for n, _ in seen[:4]] == [7, 7, 7, 3]
    with fastcl.grad_cache(chunk_size=1) as cached:
        cached(encode, names[:2], size=(224, 200)).sum().backward()
    assert seen[-1] == (1, (224, 200))


def test_the_backward_is_not_under_autocast() -> None:
    """Called within it, as the object does its own backward; the encoder has a float32 head."""
    encoder = nn.Sequential(nn.Linear(10, 16), nn.Tanh()), nn.Linear(16, D)

    def encode(x: Tensor) -> Tensor:
        hidden = encoder[0](x)
        with torch.autocast("cpu", enabled=False):
            return encoder[1](hidden.float())

    found = []
    for within in (True, False):
        for module in encoder:
            module.zero_grad()
        cache = fastcl.GradCache([encode], lambda z: fastcl.info_nce(z, z.flip(1)), 7)
        if within:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cache(images().float())
        else:
            with fastcl.grad_cache(chunk_size=7) as cached:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    z = cached(encode, images().float())
                    loss = fastcl.info_nce(z, z.flip(1))
                loss.backward()
        found.append(gradients(*encoder))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_life_of_a_step() -> None:
    encoder = image_encoder(dropout=0.2)
    step = fastcl.grad_cache(chunk_size=8)
    with step as cached:
        z = cached(encoder, images())
        with pytest.raises(RuntimeError, match="open already"):
            step.__enter__()
        z.sum().backward()
    with pytest.raises(RuntimeError, match="after their block has ended reaches no encoder"):
        z.square().sum().backward()
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    with fastcl.grad_cache(chunk_size=8, keep=0) as cached:
        z = cached(encoder, images())
        fastcl.info_nce(z, cached(lambda x: frozen(x), images()), normalize=True).backward()


def test_random_numbers_after_an_encoder_that_raises_when_run_again() -> None:
    calls = 0

    def encode(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyError
        return F.dropout(x, 0.5) * torch.ones(10, dtype=x.dtype, requires_grad=True)

    torch.manual_seed(0)
    with pytest.raises(KeyError):
        fastcl.GradCache([encode], lambda z: z.sum(), 8)(images())
    after = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(3):
        F.dropout(images(8), 0.5)
    assert torch.equal(after, torch.rand(1))
