"""What the processes of ``test_sharded`` do; importable by name, because each process imports it anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process_groups import process_group
from RoSE import MultiResolutionBlock, RoSEMultiHeadAttention, RotarySpatialEmbedding
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

RANKS = 2
SHAPE = (6, 6)
CPU = torch.device("cpu")
WHOLE = StateDictOptions(full_state_dict=True)
State = dict[str, Any]


class Model(nn.Module):
    """Two blocks, one with a learned spacing, and an attention."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(MultiResolutionBlock(16, 2, 2, spacing_transform=form) for form in (None, "log"))
        self.attention = RoSEMultiHeadAttention(16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, 0.7, SHAPE)
        return self.attention(x, 0.7, SHAPE)


def embeddings(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, RotarySpatialEmbedding)]


def flat(mixed: bool, use_orig_params: bool, *units: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """FSDP1 with every embedding as a unit of its own, and what else shall be one."""

    def shard(model: nn.Module) -> nn.Module:
        if not mixed:
            policy: Any = ModuleWrapPolicy({RotarySpatialEmbedding, *units})
        else:
            policy = CustomPolicy(
                lambda m: {"mixed_precision": None} if isinstance(m, RotarySpatialEmbedding) else isinstance(m, units)
            )
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=CPU,
            mixed_precision=MixedPrecision(torch.bfloat16) if mixed else None,
        )  # fmt: skip

    return shard


def by_parameter(mixed: bool, together: bool, *units: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """FSDP2 with all embeddings in one unit, or every one in its own, before what else shall be one."""

    def shard(model: nn.Module) -> nn.Module:
        policy = MixedPrecisionPolicy(torch.bfloat16 if mixed else None)
        for unit in [embeddings(model)] if together else embeddings(model):
            fully_shard(unit)
        for module in model.modules():
            if isinstance(module, units):
                fully_shard(module, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model

    return shard


WAYS: dict[str, tuple[bool, Callable[[nn.Module], nn.Module]]] = {
    f"{name}, {'param_dtype' if mixed else 'model.bfloat16()'}": (mixed, make(mixed, *options))
    for mixed in (False, True)
    for name, make, options in (
        ("FSDP1", flat, (False,)),
        ("FSDP1 of blocks", flat, (False, MultiResolutionBlock)),
        ("FSDP1, use_orig_params", flat, (True,)),
        ("FSDP1 of blocks, use_orig_params", flat, (True, MultiResolutionBlock)),
        ("FSDP2, a unit each", by_parameter, (False,)),
        ("FSDP2 of blocks, a unit each", by_parameter, (False, MultiResolutionBlock)),
        ("FSDP2, one unit", by_parameter, (True,)),
        ("FSDP2 of blocks, one unit", by_parameter, (True, MultiResolutionBlock)),
    )
}

# What is left out here takes as long again, and is marked slow: these have every option on and off, in both precisions.
FEW = ("FSDP1", "FSDP1 of blocks, use_orig_params", "FSDP2, a unit each", "FSDP2 of blocks, one unit")
SLOW = [way for way in WAYS if way.rsplit(", ", 1)[0] not in FEW]


def batch(step: int) -> Tensor:
    return torch.randn(2 * RANKS, 36, 16, generator=torch.Generator().manual_seed(step))


def half_if_pure(model: nn.Module, mixed: bool) -> nn.Module:
    return model if mixed else model.bfloat16()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).float().square().mean().backward()
    optimizer.step()


def train_in_ranks(rank: int, folder: str, ways: list[str]) -> None:
    """Train sharded in these ways, two steps, and two with a stop between them; rank 0 saves what came of it."""
    torch.set_num_threads(1)
    with process_group(dist.FileStore(f"{folder}/store", RANKS), rank, RANKS):
        came = {way: trained(rank, *WAYS[way]) for way in ways}
    if rank == 0:
        torch.save(came, Path(folder) / "came.pt")


def trained(rank: int, mixed: bool, shard: Callable[[nn.Module], nn.Module]) -> dict[str, State]:
    """The whole state before two steps, after them, and after a stop between them."""
    mine = [batch(step).tensor_split(RANKS)[rank].to(torch.float32 if mixed else torch.bfloat16) for step in (0, 1)]
    model = shard(half_if_pure(Model(), mixed))
    optimizer = optimiser(model)
    states: list[State] = []
    for x in mine:
        states.append(whole(model, optimizer))
        train(model, optimizer, x)
    states.append(whole(model, optimizer))
    resumed = shard(half_if_pure(Model(seed=1), mixed))
    again = optimiser(resumed)
    set_state_dict(
        resumed, again, model_state_dict=states[1]["model"], optim_state_dict=states[1]["optim"], options=WHOLE
    )
    train(resumed, again, mine[1])
    return {"first": states[0]["model"], "last": states[2]["model"], "resumed": whole(resumed, again)["model"]}


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The full states, copied: on a CPU they may share memory with what is trained."""
    parameters, optim = get_state_dict(model, optimizer, options=WHOLE)
    parameters = {name: value.detach().clone() for name, value in parameters.items()}
    return {"model": parameters, "optim": torch.utils._pytree.tree_map_only(Tensor, torch.clone, optim)}
