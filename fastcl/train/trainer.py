"""The training loop: steps, what is logged of them, and the state that makes a resume exact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.caching import grad_cache
from fastcl.train.captions import Captions
from fastcl.train.checkpoints import save_checkpoint
from fastcl.train.config import Config, LossLost
from fastcl.train.data import Batch, Batches, Dataset
from fastcl.train.evaluation import encoder_split, knn_accuracy
from fastcl.train.folder import RunFolder
from fastcl.train.methods import Method, StepOutput, build_method
from fastcl.train.processes import ALONE, Processes, whole_batches

WARMUP = 0.1  # the part of all steps over which the learning rate rises
READ_EVERY = 16  # at most so many steps between two reads of the losses from the device
EVALUATIONS = 10  # held-out kNN accuracies along a run

Row = dict[str, Any]


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(method: Method, config: Config) -> torch.optim.AdamW:
    """AdamW without weight decay on what is no matrix: norms, biases, the scale."""
    parameters = list(method.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups: list[Row] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


class Trainer:
    """A method, its optimizer and its stream of batches; `state` holds all of them.

    Seeds torch's global generator, from which the augmentation draws. With several processes all
    of it is the same on each, but for the rows that a step takes; the first alone writes.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        captions: Captions | None,
        folder: RunFolder,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.dataset, self.captions = config, dataset, captions
        self.folder, self.device, self.processes = folder, device, processes
        self.method = build_method(config, dataset, captions).to(device)
        self.model: nn.Module = processes.spread(self.method, device)
        self.batches = Batches(
            dataset, config.batch_size, views=self.method.views, captions=captions,
            seed=config.seed, device=device,
        )  # fmt: skip
        self.optimizer = make_optimizer(self.method, config)
        self.epoch = self.step = self.saved_epoch = 0
        self._unread: list[tuple[int, float, StepOutput]] = []
        self._last_read = 0.0
        torch.manual_seed(config.seed)
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False

    def fit(self, on_step: Callable[[], None], on_read: Callable[[Row], None]) -> None:
        """Train to the end. Saves at the start, every few epochs and at the end."""
        if self.epoch == 0:
            self.save()
        while self.epoch < self.config.epochs:
            self._last_read = time.perf_counter()
            for batch in self.batches.epoch():
                output = self.train_step(self.processes.own(batch))
                self._unread.append((self.step, self._learning_rate(), output))
                on_step()
                if len(self._unread) == READ_EVERY:
                    on_read(self._read())
            if self._unread:
                on_read(self._read())
            self._check_weights()
            self.epoch += 1
            self._evaluate_now_and_then()
            if self.epoch % self.config.checkpoint_every == 0 or self.epoch == self.config.epochs:
                self.save()

    def train_step(self, batch: Batch) -> StepOutput:
        """One step of the optimizer. Nothing here waits for the device."""
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        output = self._cached_passes(batch) if self.config.cache_chunk else self._passes(batch)
        self.optimizer.step()
        self.method.after_step()
        self.step += 1
        return replace(
            output,
            loss=output.loss.detach(),
            scale=output.scale.detach().clone(),  # it may be a parameter: the next step changes it
        )

    def _passes(self, batch: Batch) -> StepOutput:
        output: StepOutput = self.model(batch)
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output

    def _cached_passes(self, batch: Batch) -> StepOutput:
        """The same with the encoders' activations of a few images at a time."""
        with self.processes.apart(self.model):
            try:
                with grad_cache(self.config.cache_chunk) as self.method.cached:
                    output = self._passes(batch)
            finally:
                self.method.cached = None
        self.processes.average_gradients(self.method)
        return output

    def _set_learning_rate(self) -> None:
        """From the step alone: a schedule without a state that a resume would have to restore."""
        factor = learning_rate_factor(self.step, self.config.epochs * len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor

    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _read(self) -> Row:
        """Fetch the pending numbers in one transfer, log them, and refuse a loss that is lost."""
        outputs = [output for _, _, output in self._unread]
        if not self.processes.alone:
            outputs = whole_batches(outputs, self.config.batch_size, self.method.group)
        values = torch.stack([_stacked(output) for output in outputs]).tolist()
        now = time.perf_counter()
        rate = len(self._unread) * self.config.batch_size / (now - self._last_read)
        rows: list[Row] = []
        lost: int | None = None
        for (step, lr, _), numbers in zip(self._unread, values, strict=True):
            if not math.isfinite(numbers[0]):
                lost = step
                break
            rows.append(self._row(step, lr, numbers, rate))
        self._unread, self._last_read = [], now
        self._log(rows)
        if lost is not None:
            raise self._lost("loss", lost)
        return rows[-1]

    def _log(self, rows: list[Row]) -> None:
        if self.processes.first:
            self.folder.append(rows)

    def _check_weights(self) -> None:
        """A bad gradient in the last step shows in no loss yet, and must not reach a checkpoint."""
        if not all(bool(p.isfinite().all()) for p in self.method.parameters()):
            raise self._lost("weights", self.step)

    def _lost(self, what: str, step: int) -> LossLost:
        return LossLost(
            f"NaN or infinite {what} at step {step}, in epoch {self.epoch + 1}; the checkpoint of "
            f"epoch {self.saved_epoch} is kept in {self.folder.checkpoint}. Try a new run with a "
            f"lower --learning-rate (this one: {self.config.learning_rate})"
        )

    def _row(self, step: int, lr: float, numbers: list[float], rate: float) -> Row:
        loss, scale, positive, negative = numbers
        return {
            "event": "step",
            "step": step,
            "epoch": self.epoch + 1,
            "loss": loss,
            "scale": scale,
            "positive_similarity": positive,
            "negative_similarity": negative,
            "learning_rate": lr,
            "samples_per_second": rate,
        }

    def _evaluate_now_and_then(self) -> None:
        """A curve to look at; nothing is chosen by it."""
        every = max(1, self.config.epochs // EVALUATIONS)
        due = self.epoch % every == 0 or self.epoch == self.config.epochs
        if due and self.processes.first:
            accuracy = knn_accuracy(encoder_split(self.method.encoder, self.dataset))
            row = {"event": "eval", "step": self.step, "epoch": self.epoch, "knn": accuracy}
            self._log([row])

    def save(self) -> None:
        """Write the checkpoint."""
        if self.processes.first:
            save_checkpoint(self.folder.checkpoint, self.state())
        self.saved_epoch = self.epoch

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, loadable without executing code."""
        cuda = self.device.type == "cuda"
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tokenizer": None if self.captions is None else self.captions.state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "data_rng": self.batches.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the generators come last, as nothing may draw after them."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.saved_epoch = self.epoch
        if self.processes.first:
            self.folder.rewind(self.step)
        self.batches.generator.set_state(state["data_rng"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _stacked(output: StepOutput) -> Tensor:
    numbers = (
        output.loss, output.scale, output.positive_similarity, output.negative_similarity
    )  # fmt: skip
    return torch.stack([number.float() for number in numbers])
