"""Lightning and accelerate train a network as a loop of a few lines does: the same losses and the same weights."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from library_cases import beside_torchvision, images, nano
from torch import Tensor, nn

# Libraries warn of matters of their own. They are imported where they are used: elsewhere they are not installed.
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
EPOCHS, STEPS, BATCH = 3, 2, 2
OPTIONS = {"drop_path": 0.0}
Weights = dict[str, Tensor]


class Samples(torch.utils.data.Dataset):
    """Images, labels and spacings, three to a sample."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = images(1, 16, 20, seed=index)
        return image, (image[0] > 0).long(), torch.tensor([0.5, 0.5 + 0.1 * (index % 3)])


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Samples(), batch_size=BATCH)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    image, labels, spacing = batch
    return F.cross_entropy(model(image, spacing).logits, labels)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def weights(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def plain(bf16: bool, accumulate: int) -> tuple[list[float], Weights]:
    """The loop of a few lines: losses of all batches, and the weights at the end."""
    model, losses = nano(**OPTIONS), []
    optimizer = optimizer_of(model)
    batches = itertools.chain.from_iterable(loader() for _ in range(EPOCHS))
    for number, batch in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = loss_of(model, batch)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, weights(model)


def with_lightning(bf16: bool, accumulate: int, folder: Path, stop: int | None = None) -> tuple[list[float], Weights]:
    lightning = beside_torchvision("lightning")

    class Task(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = nano(**OPTIONS), []

        def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
            loss = loss_of(self.model, batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    def fit(task: Any, epochs: int, **options: Any) -> Any:
        trainer = lightning.Trainer(
            precision="bf16-mixed" if bf16 else "32-true", accumulate_grad_batches=accumulate, max_epochs=epochs,
            accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, loader(), **options)
        return trainer

    task = Task()
    if stop is not None:
        fit(task, stop).save_checkpoint(folder / "stopped.ckpt")
        losses, task = task.losses, Task()
        task.losses = losses
        fit(task, EPOCHS, ckpt_path=folder / "stopped.ckpt")
    else:
        fit(task, EPOCHS)
    return task.losses, weights(task.model)


def with_accelerate(bf16: bool, accumulate: int, folder: Path, stop: int | None = None) -> tuple[list[float], Weights]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # It keeps one state for the process, which the test before may have set otherwise.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    losses = []

    def prepared() -> tuple[Any, ...]:
        accelerator = Accelerator(
            cpu=True, mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=accumulate
        )
        model = nano(**OPTIONS)
        return accelerator, *accelerator.prepare(model, optimizer_of(model), loader())

    def fit(accelerator: Any, model: nn.Module, optimizer: Any, batches: Any, epochs: int) -> None:
        for _ in range(epochs):
            for batch in batches:
                with accelerator.accumulate(model):
                    loss = loss_of(model, batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())

    accelerator, model, optimizer, batches = prepared()
    if stop is not None:
        fit(accelerator, model, optimizer, batches, stop)
        accelerator.save_state(folder / "stopped")
        accelerator, model, optimizer, batches = prepared()
        accelerator.load_state(folder / "stopped")
    fit(accelerator, model, optimizer, batches, EPOCHS - (stop or 0))
    return losses, weights(accelerator.unwrap_model(model))


LOOPS: dict[str, Callable[..., tuple[list[float], Weights]]] = {
    "Lightning": with_lightning,
    "accelerate": with_accelerate,
}


def assert_same(got: tuple[list[float], Weights], want: tuple[list[float], Weights]) -> None:
    assert len(got[0]) == len(want[0]) == EPOCHS * STEPS
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_of_others_trains_like_a_plain_one(loop: str, bf16: bool, accumulate: int, tmp_path: Path) -> None:
    start, want = weights(nano(**OPTIONS)), plain(bf16, accumulate)
    assert all(not torch.equal(want[1][name], start[name]) for name in start), "something did not learn"
    assert_same(LOOPS[loop](bf16, accumulate, tmp_path), want)


@pytest.mark.parametrize("loop", LOOPS)
def test_going_on_from_a_checkpoint_changes_nothing(loop: str, tmp_path: Path) -> None:
    assert_same(LOOPS[loop](True, 2, tmp_path, stop=2), plain(True, 2))
