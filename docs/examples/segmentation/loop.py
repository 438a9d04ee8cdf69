"""The training itself: a network, what drives it, and how far it has come. It knows nothing of files."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from RoSE import frequency_groups
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from segmentation.crops import Crops
from segmentation.losses import Criterion
from segmentation.processes import ALONE, Processes, random_state, set_random_state
from segmentation.settings import PRECISIONS, Settings
from segmentation.sharing import gathered, replicate, shard

Batch = dict[str, Tensor]

# Matrices by their shape, and not to be pulled to zero for all that.
NEVER_DECAYED = ("raw_compactness", "log_temperature")  # beside wave vectors


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

    Several processes, of which each has a training with the same first weights, take the steps that one would: they
    share out the crops of every step, and losses and gradients are those of all crops.

    Args:
        network: to be trained, with its first weights.
        criterion: output of the network, labels, validity and a sum over processes to losses, "total" among them.
        settings: how to train.
        device: where to.
        processes: that train together.
        parallel: what each of several has of the network, one of :data:`segmentation.sharing.WAYS`.

    Attributes:
        network: with the weights of the last step.
        average: the network with moving averages of its weights, for validation and prediction.
        epoch: epochs that are complete, validation included.
        step: steps of the present epoch that are complete.
        history: a row of numbers per complete epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        settings: Settings,
        device: torch.device,
        processes: Processes = ALONE,
        parallel: str = "ddp",
    ) -> None:
        self.network = network.to(device)
        self.criterion = criterion
        self.settings = settings
        self.device = device
        self.processes = processes
        self.average = AveragedModel(self.network, multi_avg_fn=moving_average(settings.ema))
        self.forward = self.network
        self._whole: nn.Module | None = None
        if processes.size > 1 and parallel == "ddp":
            self.forward = replicate(self.network, device)
        elif processes.size > 1:
            self._whole = copy.deepcopy(self.network)
            for each in (self.network, self.average.module):
                shard(each, device, processes)
        groups = parameter_groups(self.network, settings.learning_rate, settings.weight_decay)
        self.optimiser = AdamW(groups, settings.learning_rate)
        self.schedule = warm_up_and_cosine(self.optimiser, settings.epochs * settings.steps, settings.warmup)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.epoch = 0
        self.step = 0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        # Weights were made of the same random numbers by all; what is left out in training must differ.
        set_random_state([random_state(device)], device, (settings.seed, 0), processes)

    @property
    def steps_done(self) -> int:
        """Of all epochs."""
        return self.epoch * self.settings.steps + self.step

    def finish_epoch(self, crops: Crops, workers: int, on_step: Callable[[dict[str, float]], None]) -> dict[str, float]:
        """Take the steps that the present epoch still lacks.

        Args:
            crops: ``steps * batch`` of them, the same in all processes.
            workers: further processes that cut crops; 0 for this one. They do not change the crops.
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
        """This process's share of the crops of every step."""
        crops.set_epoch(self.epoch)
        batch, share = self.settings.batch, self.settings.batch // self.processes.size
        starts = range(self.step * batch + self.processes.rank * share, len(crops), batch)
        # A generator of its own: the loader draws a number where it begins, also in the middle of an epoch.
        return iter(
            DataLoader(
                crops,
                batch_sampler=[range(start, start + share) for start in starts],
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
                worker_init_fn=_ignore_signals,
            )
        )

    def take_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, and one step of optimiser, schedule and average."""
        valid = batch["valid"].to(self.device)
        labels = batch["labels"].to(self.device)
        padding = None if batch["valid"].all() else valid
        with autocast(self.device, self.settings.precision):
            output = self.forward(batch["image"].to(self.device), batch["spacing"].to(self.device), padding)
        # Looked at before the criterion, which would refuse to match in one process while others wait for its sums.
        self._require_finite("output", self.processes.sum(output.logits.detach().float().abs().amax()), batch)
        losses = self.criterion(output, labels, valid, self.processes.sum)
        self._require_finite("loss", losses["total"], batch)
        self.optimiser.zero_grad()
        self.scaler.scale(losses["total"]).backward()
        self.scaler.unscale_(self.optimiser)
        # Gradients of wave vectors are in units of length: in nanometres the norm would be theirs alone.
        decayed, kept, *waves = (group["params"] for group in self.optimiser.param_groups)
        of_weights = nn.utils.clip_grad_norm_([*decayed, *kept], self.settings.clip)
        of_waves = nn.utils.get_total_norm([p.grad for group in waves for p in group if p.grad is not None])
        norm = _whole(of_weights) + _whole(of_waves)
        if not self.scaler.is_enabled():  # the scaler itself looks for what is too large, and leaves the step out
            self._require_finite("norm of the gradient", norm, batch)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return {"loss": losses.pop("total").item(), **{name: loss.item() for name, loss in losses.items()}}

    def _require_finite(self, what: str, value: Tensor, batch: Batch) -> None:
        """Of a value that all processes have."""
        if not math.isfinite(number := value.item()):
            shares = self.processes.gather(batch["sample"].tolist())
            raise DivergenceError(
                f"the {what} is {number} in step {self.steps_done + 1} (epoch {self.epoch + 1})",
                sorted({sample for share in shares for sample in share}),
            )

    def averaged(self) -> nn.Module:
        """The network with the averaged weights, whole in every process."""
        average: nn.Module = self.average.module
        return average if self._whole is None else gathered(average, self._whole)

    def tensors(self) -> dict[str, Any]:
        """What :mod:`segmentation.sharded` keeps and fills; of several processes, each one's own parts."""
        return {
            "network": get_model_state_dict(self.network),
            "average": get_model_state_dict(self.average.module),
            "optimiser": get_optimizer_state_dict(self.network, self.optimiser)["state"],
        }

    def state_dict(self) -> dict[str, Any]:
        """All else that is needed to go on, plain data and a few small tensors."""
        return {
            "optimiser": get_optimizer_state_dict(self.network, self.optimiser)["param_groups"],
            "averaged": int(self.average.n_averaged),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {"epoch": self.epoch, "step": self.step, "sums": self.sums, "history": self.history},
            "random": self.processes.gather(random_state(self.device)),
        }

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` and :meth:`tensors` were taken; sets torch's global random numbers too."""
        set_model_state_dict(self.network, tensors["network"])
        set_model_state_dict(self.average.module, tensors["average"])
        optimiser: Any = {"state": tensors["optimiser"], "param_groups": state["optimiser"]}
        set_optimizer_state_dict(self.network, self.optimiser, optimiser)
        self.average.n_averaged.fill_(state["averaged"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        set_random_state(state["random"], self.device, (self.settings.seed, self.steps_done), self.processes)


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _ignore_signals(_: int) -> None:
    """Ctrl-C reaches workers too, and so does SIGTERM where torchrun passes it on; they end with the training."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def parameter_groups(network: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, those that do not, and wave vectors, whose rate is in units of their own.

    Decay says that a number had better be zero. That suits weights, which a norm scales anyway; it does not suit
    biases and the scales of norms (one axis, all of them), nor wave vectors (zero is no position at all), compactness
    and temperatures (zero is some value like any other).
    """
    waves = frequency_groups(network, learning_rate)
    grouped = {id(p) for group in waves for p in group["params"]}
    decayed, kept = [], []
    for name, parameter in network.named_parameters():
        if id(parameter) in grouped:
            continue
        matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in NEVER_DECAYED
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}, *waves]


def warm_up_and_cosine(optimiser: Optimizer, steps: int, warmup: float) -> LRScheduler:
    """Linear from a hundredth, then half a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    up = LinearLR(optimiser, start_factor=0.01, total_iters=rising)
    down = CosineAnnealingLR(optimiser, T_max=max(1, steps - rising))
    return SequentialLR(optimiser, [up, down], milestones=[rising])


def moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]:
    """Of weights; over few of them while there are few, so that the first weights are soon forgotten."""

    def average(means: Sequence[Tensor], news: Sequence[Tensor], count: Tensor) -> None:
        keep = min((1 + count.item()) / (10 + count.item()), decay)
        for mean, new in zip(means, news, strict=True):
            mean.lerp_(new, 1 - keep)

    return average


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A precision of :data:`segmentation.settings.PRECISIONS`, for the forward pass."""
    mixed = precision != "float32"
    return torch.autocast(device.type, PRECISIONS[precision] if mixed else None, enabled=mixed)
