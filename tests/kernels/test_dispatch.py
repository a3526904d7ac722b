"""The dispatch table: names, contexts, and what "auto" prefers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import fastcl
from fastcl.kernels import dispatch, register
from fastcl.kernels.cpu import backend as cpu_backend
from fastcl.kernels.cpu.backend import CpuBackend, missing_extension
from fastcl.kernels.torch_backend import TorchBackend

CPU, META = torch.device("cpu"), torch.device("meta")
needs_compiled = pytest.mark.skipif(missing_extension() is not None, reason="no compiled kernels")


def _chosen(device: torch.device = CPU) -> str:
    return dispatch.resolve("auto", device)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the table, so that what a test registers is gone after it."""
    monkeypatch.setattr(dispatch, "_BACKENDS", dict(dispatch._BACKENDS))
    monkeypatch.setattr(dispatch, "_AUTO_ORDER", list(dispatch._AUTO_ORDER))


def test_contexts_nest_and_restore() -> None:
    free = _chosen()
    with fastcl.use_backend("torch"):
        assert _chosen() == "torch"
        with fastcl.use_backend("reference"):
            assert _chosen() == "reference"
            with fastcl.use_backend("auto"):
                assert _chosen() == free
            assert _chosen() == "reference"
        assert _chosen() == "torch"
    assert _chosen() == free


def test_a_context_restores_after_an_exception() -> None:
    free = _chosen()
    with pytest.raises(KeyError), fastcl.use_backend("reference"):
        raise KeyError
    assert _chosen() == free
    with fastcl.use_backend("reference"):
        with pytest.raises(ValueError, match="not known"), fastcl.use_backend("gpu"):
            pytest.fail("an unknown name was accepted")
        assert _chosen() == "reference"


def test_a_context_is_its_threads_own() -> None:
    free, seen = _chosen(), {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        seen["before"] = _chosen()
        with fastcl.use_backend("torch"):
            inside.set()
            done.wait(10)
            seen["inside"] = _chosen()

    with fastcl.use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        seen["main"] = _chosen()
        done.set()
        thread.join()
    assert seen == {"before": free, "main": "reference", "inside": "torch"}
    assert _chosen() == free


def test_contexts_of_two_threads_that_overlap_leave_nothing_behind() -> None:
    """What torch.compile guards on is one name for all threads."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fastcl.use_backend("torch"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fastcl.use_backend("reference"):
        thread.start()
        assert entered.wait(10)
        assert dispatch._forced_last == "torch"
    leave.set()
    thread.join()
    assert dispatch._forced_last == "auto"
    with fastcl.use_backend("torch"), fastcl.use_backend("reference"):
        assert dispatch._forced_last == "reference"
    assert dispatch._forced_last == "auto"


def test_an_explicit_argument_wins_over_the_context() -> None:
    with fastcl.use_backend("reference"):
        assert dispatch.resolve("torch", CPU) == "torch"
    with fastcl.use_backend("torch"):
        assert dispatch.resolve("reference", CPU) == "reference"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_context_reaches_the_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    statistics = TorchBackend.logsumexp
    of_reference = fastcl.reference.clip_loss

    def streamed(self, *args):
        used.append("torch" if type(self) is TorchBackend else "another")
        return statistics(self, *args)

    def whole(*args, **options):
        used.append("reference")
        return of_reference(*args, **options)

    monkeypatch.setattr(TorchBackend, "logsumexp", streamed)
    monkeypatch.setattr(fastcl.reference, "clip_loss", whole)
    u = torch.randn(4, 3)
    with fastcl.use_backend(name):
        fastcl.clip_loss(u, u, 2.0)
    assert used == [name]


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "Auto"])
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    u = torch.randn(4, 3)
    every = "auto, reference, torch, triton, cpu"
    for call in (
        lambda: fastcl.clip_loss(u, u, 2.0, backend=name),
        lambda: fastcl.similarity_logsumexp(u, backend=name),
        lambda: fastcl.use_backend(name).__enter__(),
    ):
        with pytest.raises(ValueError, match="is not known") as refused:
            call()
        assert repr(name) in str(refused.value)
        assert every in str(refused.value)


@needs_compiled
def test_available_backends_on_the_cpu_the_best_first() -> None:
    assert fastcl.available_backends() == ["cpu", "torch", "reference"]
    assert fastcl.available_backends(CPU) == fastcl.available_backends("cpu")
    assert _chosen() == "cpu"


def test_available_backends_elsewhere() -> None:
    assert fastcl.available_backends("meta") == ["torch", "reference"]
    assert _chosen(META) == "torch"


def test_cpu_is_refused_for_other_tensors_with_a_reason() -> None:
    u = torch.empty(4, 3, device="meta")
    with pytest.raises(ValueError, match=r"'cpu' cannot be used here.*on meta.*CPU only"):
        fastcl.clip_loss(u, u, 2.0, backend="cpu")
    with (
        fastcl.use_backend("cpu"),
        pytest.raises(ValueError, match=r"'cpu' cannot be used here.*CPU only"),
    ):
        fastcl.clip_loss(u, u, 2.0)


def test_without_compiled_kernels_auto_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(cpu_backend, "_extension", None)
    monkeypatch.setattr(cpu_backend, "_why_not", "a test took them away")
    monkeypatch.setattr(dispatch, "_said", set())
    assert fastcl.available_backends() == ["torch", "reference"]
    for _ in range(3):
        assert _chosen() == "torch"
    assert _chosen(META) == "torch"
    said = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert len(said) == 1
    assert "a test took them away" in said[0]
    with pytest.raises(ValueError, match="a test took them away"):
        dispatch.resolve("cpu", CPU)


@pytest.mark.parametrize(
    "call",
    [
        lambda u: fastcl.clip_loss(u, u, 2.0),
        lambda u: fastcl.similarity_logsumexp(u),
        lambda u: fastcl.losses.NTXentLoss()(u, u),
    ],
    ids=["loss", "primitive", "module"],
)
def test_the_fallbacks_warning_points_at_the_users_line(
    call: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_backend, "_extension", None)
    monkeypatch.setattr(dispatch, "_said", set())
    with pytest.warns(RuntimeWarning) as said:
        call(torch.randn(4, 3))
    assert [(w.filename, w.lineno) for w in said] == [(__file__, call.__code__.co_firstlineno)]


class _Mine(TorchBackend):
    """A backend for one device type that counts its calls."""

    made_for = ("cpu",)

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "mine is for the CPU"

    def logsumexp(self, *args):
        self.calls += 1
        return super().logsumexp(*args)


@pytest.mark.usefixtures("table")
def test_auto_prefers_what_was_registered_last() -> None:
    before = fastcl.available_backends()
    mine = _Mine()
    register("mine", mine)
    assert fastcl.available_backends() == ["mine", *before]
    assert "mine" not in fastcl.available_backends("meta")
    assert _chosen(META) == "torch"
    u = torch.randn(4, 3)
    ours = fastcl.clip_loss(u, u, 2.0)
    assert mine.calls == 1
    torch.testing.assert_close(ours, fastcl.clip_loss(u, u, 2.0, backend="mine"))
    assert mine.calls == 2
    fastcl.clip_loss(u, u, 2.0, backend="torch")
    assert mine.calls == 2
    with pytest.raises(ValueError, match="mine is for the CPU"):
        dispatch.resolve("mine", META)


def test_what_a_test_registers_is_gone_after_it() -> None:
    assert set(dispatch.names()) == {"auto", "reference", "torch", "triton", "cpu"}
    assert isinstance(dispatch.get("cpu"), CpuBackend)
