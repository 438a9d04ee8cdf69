"""How a network is shared out over processes: every one has it (DDP), or a part of every parameter (FSDP2)."""

from __future__ import annotations

import warnings

import torch
from spatial_grouping_attention.models.downsample import Grouping
from spatial_grouping_attention.models.stage import Block
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from segmentation.processes import Processes

WAYS = ("ddp", "fsdp")


def shard(network: nn.Module, device: torch.device, processes: Processes) -> None:
    """Leave a part of every parameter to every process; blocks and groupings are whole only while they compute.

    Parameters stay float32, and autocast makes their copies in the forward pass, as it does without sharding. Policies
    of mixed precision would halve what is exchanged, and would want wave vectors in units of their own.
    """
    # Nothing changes what a network returns in place, which would lose the hooks that gather parameters.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes.size,))
    for module in network.modules():
        if isinstance(module, (Block, Grouping)):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def replicate(network: nn.Module, device: torch.device) -> nn.Module:
    """What to call in place of a network that every process has, so that gradients are the means over processes."""
    # Kernels of depthwise convolutions have an axis of length 1, whose stride is any number.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def gathered(network: nn.Module, whole: nn.Module) -> nn.Module:
    """Fill a network that every process has whole with the weights of one of which they have parts."""
    weights = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(weights)
    return whole
