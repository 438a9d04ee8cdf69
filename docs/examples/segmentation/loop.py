"""The training itself: a network, what drives it, and how far it has come. It knows nothing of files."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from segmentation.crops import Crops
from segmentation.losses import Criterion
from segmentation.settings import PRECISIONS, Settings

Batch = dict[str, Tensor]

# Matrices by their shape, and not to be pulled to zero for all that.
NEVER_DECAYED = ("freqs", "raw_compactness", "log_temperature")


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer a number.

    Args:
        message: which, and when.
        samples: numbers of the samples that the step's crops were from.
    """

    def __init__(self, message: str, samples: list[int]) -> None:
        super().__init__(message)
        self.samples = samples


class Training:
    """Everything that changes while a network is trained. It can be kept, and gone on with to the bit.

    Args:
        network: to be trained, with its first weights.
        criterion: output of the network, labels and validity to losses, "total" among them.
        settings: how to train.
        device: where to.

    Attributes:
        network: with the weights of the last step.
        average: the network with moving averages of its weights, for validation and prediction.
        epoch: epochs that are complete, validation included.
        step: steps of the present epoch that are complete.
        history: a row of numbers per complete epoch.
    """

    def __init__(self, network: nn.Module, criterion: Criterion, settings: Settings, device: torch.device) -> None:
        self.network = network.to(device)
        self.criterion = criterion
        self.settings = settings
        self.device = device
        self.average = AveragedModel(self.network, avg_fn=moving_average(settings.ema))
        groups = parameter_groups(self.network, settings.weight_decay)
        self.optimiser = AdamW(groups, settings.learning_rate)
        self.schedule = warm_up_and_cosine(self.optimiser, settings.epochs * settings.steps, settings.warmup)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.epoch = 0
        self.step = 0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    @property
    def steps_done(self) -> int:
        """Of all epochs."""
        return self.epoch * self.settings.steps + self.step

    def finish_epoch(self, crops: Crops, workers: int, on_step: Callable[[dict[str, float]], None]) -> dict[str, float]:
        """Take the steps that the present epoch still lacks.

        Args:
            crops: ``steps * batch`` of them.
            workers: processes that cut crops; 0 for this one. They do not change the crops.
            on_step: told the losses after every step. What it raises leaves the training between two steps.

        Returns:
            Means of the losses of the epoch.

        Raises:
            DivergenceError: a loss or a gradient is not finite; the weights are those before the step.
        """
        self.network.train()
        for batch in self._batches(crops, workers):
            losses = self.take_step(batch)
            self.step += 1
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
            on_step(losses)
        return {name: value / self.settings.steps for name, value in self.sums.items()}

    def close_epoch(self, row: dict[str, Any]) -> None:
        """Add a row to the history and begin the next epoch."""
        self.history.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def _batches(self, crops: Crops, workers: int) -> Iterator[Batch]:
        crops.set_epoch(self.epoch)
        # A generator of its own: the loader draws a number where it begins, also in the middle of an epoch.
        return iter(
            DataLoader(
                crops,
                self.settings.batch,
                sampler=range(self.step * self.settings.batch, len(crops)),
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
                worker_init_fn=_ignore_the_keyboard,
            )
        )

    def take_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, and one step of optimiser, schedule and average."""
        valid = batch["valid"].to(self.device)
        labels = batch["labels"].to(self.device)
        padding = None if batch["valid"].all() else valid
        with autocast(self.device, self.settings.precision):
            output = self.network(batch["image"].to(self.device), batch["spacing"].to(self.device), padding)
        losses = self.criterion(output, labels, valid)
        self._require_finite("loss", losses["total"], batch)
        self.optimiser.zero_grad()
        self.scaler.scale(losses["total"]).backward()
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        if not self.scaler.is_enabled():  # the scaler itself looks for what is too large, and leaves the step out
            self._require_finite("norm of the gradient", norm, batch)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return {"loss": losses.pop("total").item(), **{name: loss.item() for name, loss in losses.items()}}

    def _require_finite(self, what: str, value: Tensor, batch: Batch) -> None:
        if not math.isfinite(number := value.item()):
            samples = sorted(set(batch["sample"].tolist()))
            raise DivergenceError(
                f"the {what} is {number} in step {self.steps_done + 1} (epoch {self.epoch + 1})", samples
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, from which :meth:`load_state_dict` goes on."""
        on_gpu = self.device.type == "cuda"
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {"epoch": self.epoch, "step": self.step, "sums": self.sums, "history": self.history},
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if on_gpu else []},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; sets torch's global random numbers too."""
        for name in ("network", "average", "optimiser", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if self.device.type == "cuda" and state["random"]["cuda"]:
            torch.cuda.set_rng_state_all([numbers.cpu() for numbers in state["random"]["cuda"]])


def _ignore_the_keyboard(_: int) -> None:
    """Ctrl-C reaches workers too; they go on until the step is complete."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not, for an optimiser.

    Decay says that a number had better be zero. That suits weights, which a norm scales anyway; it does not suit
    biases and the scales of norms (one axis, all of them), nor wave vectors (zero is no position at all), compactness
    and temperatures (zero is some value like any other).
    """
    decayed, kept = [], []
    for name, parameter in network.named_parameters():
        matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in NEVER_DECAYED
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warm_up_and_cosine(optimiser: Optimizer, steps: int, warmup: float) -> LRScheduler:
    """Linear from a hundredth, then half a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    up = LinearLR(optimiser, start_factor=0.01, total_iters=rising)
    down = CosineAnnealingLR(optimiser, T_max=max(1, steps - rising))
    return SequentialLR(optimiser, [up, down], milestones=[rising])


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of weights; over few of them while there are few, so that the first weights are soon forgotten."""

    def average(mean: Tensor, new: Tensor, count: Tensor) -> Tensor:
        keep = torch.clamp((1 + count) / (10 + count), max=decay)
        return torch.lerp(new, mean, keep.to(new.dtype))

    return average


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A precision of :data:`segmentation.settings.PRECISIONS`, for the forward pass."""
    mixed = precision != "float32"
    return torch.autocast(device.type, PRECISIONS[precision] if mixed else None, enabled=mixed)
