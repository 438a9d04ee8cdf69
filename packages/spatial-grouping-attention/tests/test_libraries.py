"""Libraries that move, cast, wrap and hook models do so with layers: Lightning, accelerate, PEFT, Opacus, FSDP."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from RoSE import Grid, RotarySpatialEmbedding
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    GroupingOutput,
    SparseSpatialGroupingAttention,
    WindowedSelfAttention,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.func import functional_call, grad, vmap

# Libraries warn of matters of their own. They are imported where they are used: elsewhere they are not installed.
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
GRID = Grid((4, 4), 0.7)
GROUPING: dict[str, Callable[..., nn.Module]] = {
    "sparse": SparseSpatialGroupingAttention,
    "dense": DenseSpatialGroupingAttention,
    "deformable": DeformableSpatialGroupingAttention,
}
KINDS = [*GROUPING, "windowed"]


class Model(nn.Module):
    """Features of groups, or of tokens."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.grouping = kind in GROUPING
        if self.grouping:
            self.body = GROUPING[kind](16, 2, 3, 2, iters=2, **options)
            # What stands in for masked tokens is not used here, and optimisers of some libraries want every gradient.
            self.body.mask_embedding.requires_grad_(False)
        else:
            self.body = WindowedSelfAttention(16, 2, 2, 3, **options)

    def forward(self, x: Tensor, grid: Grid = GRID) -> GroupingOutput | Tensor:
        x = self.first(x)
        return self.body(x, input_grid=grid) if self.grouping else self.body(x, grid.spacing, grid.shape)


class Scalar(nn.Module):
    """One number per sample of what a model returns."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.model = Model(kind, **options)

    def forward(self, x: Tensor) -> Tensor:
        return features(self.model(x)).flatten(1).square().mean(1)


def features(output: GroupingOutput | Tensor) -> Tensor:
    return output.x_out if isinstance(output, GroupingOutput) else output


def samples() -> Tensor:
    return torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(1))


def wave_vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "rotary" in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_lightning_trains_in_half_types_and_wave_vectors_stay_whole(kind: str, precision: str, tmp_path: Path) -> None:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(kind)

        def training_step(self, batch: tuple[Tensor, Grid], index: int) -> dict[str, Any]:
            output = self.model(*batch)
            return {"loss": features(output).float().square().mean(), "output": output}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    task = Task()
    before = wave_vectors(task)
    loader = torch.utils.data.DataLoader(samples(), batch_size=2, collate_fn=lambda parts: (torch.stack(parts), GRID))
    trainer = lightning.Trainer(
        precision=precision, max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, loader)
    for name, value in wave_vectors(task).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), f"{name} did not learn"
        assert not torch.equal(value, value.to(torch.bfloat16).float()), f"{name} was rounded on its way"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_offloads_every_layer(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import accelerate

    model, x = Model(kind).to(dtype), samples().to(dtype)
    expected = features(model(x))
    cpu = torch.device("cpu")
    for offloaded in (
        accelerate.cpu_offload(copy.deepcopy(model), execution_device=cpu),
        accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=cpu),
    ):
        assert offloaded.body.rotary.freqs.is_meta
        assert torch.equal(features(offloaded(x)), expected)


@pytest.mark.parametrize("kind", GROUPING)
def test_accelerate_prepares_layers_and_moves_their_outputs(kind: str) -> None:
    import accelerate
    from accelerate.utils import send_to_device

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = Model(kind)
    before = wave_vectors(model)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    output = prepared(samples())
    assert isinstance(output, GroupingOutput)
    assert output.x_out.dtype == torch.float32
    accelerator.backward(output.x_out.square().mean())
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in wave_vectors(model).items())
    output = model(samples())
    moved = send_to_device(output, torch.device("cpu"))
    assert isinstance(moved, GroupingOutput)
    assert torch.equal(moved.x_out, output.x_out)
    assert torch.equal(moved.assignment.labels(), output.assignment.labels())
    assert send_to_device(output, torch.device("meta")).x_out.is_meta


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["first", "qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc2"]},
        {"target_modules": [], "target_parameters": ["rotary.freqs"]},
        {"target_modules": ["first"], "modules_to_save": ["rotary"]},
    ],
    ids=["projections", "freqs", "saved whole"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_projections_and_wave_vectors(
    kind: str, dtype: torch.dtype, targets: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    x = samples().to(dtype)
    expected = features(Model(kind).to(dtype)(x))
    adapted = peft.get_peft_model(Model(kind).to(dtype), peft.LoraConfig(r=2, **targets))
    torch.testing.assert_close(features(adapted(x)), expected, rtol=0, atol=0)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    for _ in range(2):  # the second factor of an adapter starts at zero, and with it the first one's gradient
        optimizer.zero_grad()
        features(adapted(x)).float().square().mean().backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
    tuned = features(adapted(x))
    assert not torch.equal(tuned, expected)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Model(kind).to(dtype), tmp_path)
    torch.testing.assert_close(features(again(x)), tuned, rtol=0, atol=0)
    merged = adapted.merge_and_unload()
    assert isinstance(merged.body.rotary, RotarySpatialEmbedding)
    assert merged.body.rotary.freqs.dtype == torch.float32
    if dtype == torch.float32:
        torch.testing.assert_close(features(merged(x)), tuned)


def one_by_one(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of every sample, each by a backward pass of its own."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(model(sample[None]).sum(), list(parameters.values())) for sample in x]
    return {name: torch.stack(row) for name, row in zip(parameters, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_opacus_hooks_give_gradients_per_sample_where_wave_vectors_are_fixed(kind: str) -> None:
    from opacus import GradSampleModule

    model = Scalar(kind, learnable=False)
    right = one_by_one(model, samples())
    # Opacus's own rule for convolutions gives 0 for what is laid out channels last, as the tokens of a grid are.
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum", force_functorch=True)
    hooked(samples()).sum().backward()
    for name, gradient in right.items():
        torch.testing.assert_close(dict(hooked._module.named_parameters())[name].grad_sample, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_opacus_trains_learned_wave_vectors_by_torch_func(kind: str) -> None:
    """As docs/rose.md says: Opacus's hooks see a module's positional tensors, and a rotation is made of more."""
    from opacus import PrivacyEngine

    model, x = Scalar(kind), samples()
    right = one_by_one(model, x)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=len(x))
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=0.0, max_grad_norm=1e6, poisson_sampling=False, grad_sample_mode="no_op",
    )  # fmt: skip
    trainable = {name: p for name, p in private.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(private, parameters, (sample[None],)).sum()

    for name, gradient in vmap(grad(loss), in_dims=(None, 0))(trainable, x).items():
        trainable[name].grad_sample = gradient
        torch.testing.assert_close(gradient, right[name.removeprefix("_module.")], rtol=1e-4, atol=1e-6)
    optimizer.step()
    # Without noise and clipping a private step is a plain one.
    for name, gradient in right.items():
        stepped = model.get_parameter(name).detach()
        torch.testing.assert_close(stepped, before[name] - 0.1 * gradient.mean(0), rtol=1e-4, atol=1e-6)


def flat(model: nn.Module, use_orig_params: bool) -> nn.Module:
    policy = ModuleWrapPolicy({RotarySpatialEmbedding})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=cpu)


def by_parameter(model: nn.Module) -> nn.Module:
    fully_shard([module for module in model.modules() if isinstance(module, RotarySpatialEmbedding)])
    fully_shard(model)
    return model


SHARDED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FSDP1": lambda model: flat(model, False),
    "FSDP1, use_orig_params": lambda model: flat(model, True),
    "FSDP2": by_parameter,
}
RANKS = 2


def stepped(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Parameters after one step of plain gradient descent."""
    output = model(x)
    features(output).float().square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # type: ignore[return-value]


class Stack(nn.Module):
    """Two layers, each of which calls its embedding more than once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = Model(kind)
        self.second = Model(kind).body

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        if isinstance(out, GroupingOutput):
            return self.second(out.x_out, input_grid=out.grid).x_out
        return self.second(out, GRID.spacing, GRID.shape)


def sharded_model(kind: str) -> nn.Module:
    model = Stack(kind).bfloat16()
    return model.requires_grad_(True)  # FSDP1 flattens only what learns alike


def step_in_rank(rank: int, folder: str) -> None:
    """What a process of the test below does."""
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    x = samples().bfloat16().tensor_split(RANKS)[rank]
    came = {(kind, way): stepped(SHARDED[way](sharded_model(kind)), x) for kind in KINDS for way in SHARDED}
    if rank == 0:
        torch.save(came, f"{folder}/came.pt")
    gc.collect()  # where a module is the last hold on the group, its threads and this one can wait for each other
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    # This file is what the processes run: pytest imports it under a name that they would not find.
    runs = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(RANKS)]
    assert [run.wait() for run in runs] == [0] * RANKS
    return torch.load(folder / "came.pt")


@pytest.mark.parametrize("way", SHARDED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_half_type_layer_steps_in_two_processes_as_in_one(kind: str, way: str, came: Any) -> None:
    before = wave_vectors(sharded_model(kind))
    alone = stepped(sharded_model(kind), samples().bfloat16())
    sharded = came[kind, way]
    assert sharded.keys() == alone.keys()
    for name, start in before.items():
        assert sharded[name].dtype == torch.float32
        step, right = sharded[name] - start, alone[name] - start
        assert right.norm() > 0
        # Gradients pass through bfloat16 features; those of one rank alone are off by a quarter and more.
        assert (step - right).norm() < 0.05 * right.norm()


if __name__ == "__main__":
    step_in_rank(int(sys.argv[1]), sys.argv[2])
