"""Libraries that move, cast, wrap and hook models do so with these: Lightning, accelerate, PEFT, Opacus."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from RoSE import Grid, MultiResolutionBlock, RoSEMultiHeadAttention, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

# Libraries warn of matters of their own. They are imported where they are used: elsewhere they are not installed.
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
GRID = Grid((4, 4), 0.7)
KINDS: dict[str, Callable[..., nn.Module]] = {
    "block": MultiResolutionBlock,
    "attention": RoSEMultiHeadAttention,
    "scores": RoSEMultiHeadCrossAttention,
}


class Model(nn.Module):
    """One number per sample."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Linear(8, 16)
        self.body = KINDS[kind](16, 2, 2, **options)

    def forward(self, x: Tensor, coordinates: Any = GRID) -> Tensor:
        x = self.first(x)
        sides = (x, x) if self.kind == "scores" else (x,)
        return self.body(*sides, coordinates=coordinates).flatten(1).square().mean(1)


def samples(count: int = 4) -> Tensor:
    return torch.randn(count, 16, 8, generator=torch.Generator().manual_seed(1))


def wave_vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "rotary" in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_lightning_trains_in_half_types_and_wave_vectors_stay_whole(kind: str, precision: str, tmp_path: Path) -> None:
    import lightning

    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(kind, spacing_transform="log")

        def training_step(self, batch: tuple[Tensor, Grid], index: int) -> Tensor:
            seen.append((batch[0].dtype, self.model.first.weight.dtype))
            return self.model(*batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    task = Task()
    before = wave_vectors(task)
    # A grid in the batch, because Lightning walks through batches to move and to cast what they hold.
    loader = torch.utils.data.DataLoader(samples(), batch_size=2, collate_fn=lambda parts: (torch.stack(parts), GRID))
    trainer = lightning.Trainer(
        precision=precision, max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, loader)
    half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert seen == [(half, half)] * 2
    after = wave_vectors(task)
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), f"{name} did not learn"
        assert not torch.equal(value, value.to(torch.bfloat16).float()), f"{name} was rounded on its way"
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    restored = Task.load_from_checkpoint(tmp_path / "task.ckpt", map_location="cpu")
    assert all(torch.equal(value, after[name]) for name, value in wave_vectors(restored).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_offloads_every_module(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import accelerate

    model = Model(kind, spacing_transform="power").to(dtype)
    x = samples().to(dtype)
    expected = model(x)
    cpu = torch.device("cpu")
    for offloaded in (
        accelerate.cpu_offload(copy.deepcopy(model), execution_device=cpu),
        accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=cpu),
    ):
        assert offloaded.body.rotary.freqs.is_meta
        assert torch.equal(offloaded(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_prepares_and_loads(kind: str, tmp_path: Path) -> None:
    import accelerate
    from accelerate.utils import send_to_device

    model = Model(kind)
    torch.save(model.state_dict(), tmp_path / "float32.pt")
    torch.save(copy.deepcopy(model).bfloat16().state_dict(), tmp_path / "bfloat16.pt")
    x, half = samples(), samples().bfloat16()
    expected, expected_half = model(x), copy.deepcopy(model).bfloat16()(half)
    for name, dtype, given, right in (
        ("float32.pt", torch.float32, x, expected), ("bfloat16.pt", torch.bfloat16, half, expected_half),
    ):  # fmt: skip
        with accelerate.init_empty_weights():
            empty = Model(kind).to(dtype)
        loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / name), device_map={"": "cpu"})
        assert torch.equal(loaded(given), right)
    with accelerate.init_empty_weights():
        empty = Model(kind)
    cast = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "float32.pt"), device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    with pytest.raises(TypeError, match="freqs of RotarySpatialEmbedding must be float64 or float32"):
        cast(half)

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = wave_vectors(model)
    accelerator.backward(prepared(x).mean())
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in wave_vectors(model).items())
    grid = Grid((4, 4), torch.tensor([0.5, 0.7]))
    moved = send_to_device({"where": grid}, torch.device("cpu"))
    assert torch.equal(moved["where"].coordinates(), grid.coordinates())


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["first", "qkv", "q_proj", "kv_proj", "proj", "fc1", "fc2"]},
        {"target_modules": [], "target_parameters": ["rotary.freqs"]},
        {"target_modules": ["first"], "target_parameters": ["body.rotary.freqs"]},
        {"target_modules": ["first"], "modules_to_save": ["rotary"]},
    ],
    ids=["projections", "freqs", "both", "saved whole"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_projections_and_wave_vectors(
    kind: str, dtype: torch.dtype, targets: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    x = samples().to(dtype)
    expected = Model(kind).to(dtype)(x)
    before = wave_vectors(Model(kind))
    adapted = peft.get_peft_model(Model(kind).to(dtype), peft.LoraConfig(r=2, **targets))
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=0)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    for _ in range(2):  # the second factor of an adapter starts at zero, and with it the first one's gradient
        optimizer.zero_grad()
        adapted(x).float().mean().backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
    tuned = adapted(x)
    assert not torch.equal(tuned, expected)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Model(kind).to(dtype), tmp_path)
    torch.testing.assert_close(again(x), tuned, rtol=0, atol=0)
    merged = adapted.merge_and_unload()
    loose = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(merged(x), tuned, **loose)
    assert isinstance(merged.body.rotary, RotarySpatialEmbedding)
    freqs = merged.body.rotary.freqs
    assert freqs.dtype == torch.float32
    turned = "modules_to_save" in targets or "target_parameters" in targets
    assert torch.equal(freqs, before["body.rotary.freqs"]) != turned


def one_by_one(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of every sample, each by a backward pass of its own."""
    parameters = dict(model.named_parameters())
    rows = [torch.autograd.grad(model(sample[None]).sum(), list(parameters.values())) for sample in x]
    return {name: torch.stack(row) for name, row in zip(parameters, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_opacus_hooks_give_gradients_per_sample_where_wave_vectors_are_fixed(kind: str) -> None:
    from opacus import GradSampleModule

    model = Model(kind, learnable=False)
    right = one_by_one(model, samples())
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    hooked(samples()).sum().backward()
    for name, parameter in hooked._module.named_parameters():
        torch.testing.assert_close(parameter.grad_sample, right[name])


@pytest.mark.parametrize("transform", [None, "log"])
@pytest.mark.parametrize("kind", KINDS)
def test_opacus_trains_learned_wave_vectors_by_torch_func(kind: str, transform: str | None) -> None:
    """As docs/rose.md says: Opacus's hooks see a module's positional tensors, and a rotation is made of more."""
    from opacus import PrivacyEngine

    model, x = Model(kind, spacing_transform=transform), samples()
    right = one_by_one(model, x)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=len(x))
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=0.0, max_grad_norm=1e6, poisson_sampling=False, grad_sample_mode="no_op",
    )  # fmt: skip
    parameters = dict(private.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(private, parameters, (sample[None],)).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for name, parameter in parameters.items():
        parameter.grad_sample = per_sample[name]
        torch.testing.assert_close(per_sample[name], right[name.removeprefix("_module.")])
    optimizer.step()
    # Without noise and clipping a private step is a plain one.
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * right[name].mean(0))
