"""What layers return, in the hands of generic code: mappings, dataclasses, pytrees, containers, files."""

import copy
import dataclasses
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import VARIANTS, make_layer, tokens
from spatial_grouping_attention import GroupingOutput, compose
from torch.utils import _pytree as pytree

EVERY_VARIANT = tuple(VARIANTS)
FIELDS = ["x_out", "out_grid_shape", "out_spacing", "out_origin", "assignment", "valid"]
SHAPE = (6, 9)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_the_output_reads_like_a_dict_and_a_dataclass(variant: str) -> None:
    output = make_layer(variant)(tokens(SHAPE), 1.0, SHAPE)
    assert isinstance(output, GroupingOutput)
    assert list(output) == list(output.keys()) == FIELDS
    assert [field.name for field in dataclasses.fields(output)] == FIELDS
    assert len(output) == 6
    for name, value in output.items():
        assert output[name] is value is getattr(output, name)
    assert {**output}.keys() == set(FIELDS)
    assert "x_out" in output
    assert "nothing" not in output
    assert output.get("nothing") is None
    for missing in ("nothing", "values", 0):
        with pytest.raises(KeyError):
            output[missing]


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_the_output_is_a_pytree(variant: str) -> None:
    output = make_layer(variant)(tokens(SHAPE), 1.0, SHAPE)
    doubled = pytree.tree_map(lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf, output)
    assert isinstance(doubled, GroupingOutput)
    assert type(doubled.assignment) is type(output.assignment)
    assert doubled.x_out.dtype == torch.float64
    assert doubled.out_grid_shape == output.out_grid_shape
    values = torch.randn(2, output.x_out.shape[1], 3)
    assert_near(doubled.assignment.upsample(values), output.assignment.upsample(values), 1e-5)
    leaves, structure = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, structure)
    assert torch.equal(again.assignment.matrix(), output.assignment.matrix())


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_outputs_leave_the_graph_and_move_whole(variant: str) -> None:
    layer, valid = make_layer(variant), torch.ones(2, *SHAPE, dtype=torch.bool)
    output = layer(tokens(SHAPE), torch.ones(2, 2), SHAPE, valid=valid)
    for whole in (output, output.assignment, compose([output.assignment])):
        detached = whole.detach()
        assert type(detached) is type(whole)
        assert any(x.requires_grad for x in tensors_of(whole))
        assert not any(x.requires_grad for x in tensors_of(detached))
        moved = whole.to("meta")
        assert type(moved) is type(whole)
        assert all(x.is_meta for x in tensors_of(moved))
        assert moved.to(torch.device("meta"), non_blocking=True) is not None
    values = torch.randn(2, 15, 2)
    assert torch.equal(output.detach().assignment.upsample(values), output.assignment.upsample(values))
    assert output.to("cpu").grid == output.grid


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def rebuilt(data: object, function: Callable[[torch.Tensor], torch.Tensor], dataclasses_first: bool) -> object:
    """How libraries that train models walk through what models return.

    Mappings are made anew from mappings, sequences from sequences, and of dataclasses a copy's attributes are set. What
    is both is taken for a dataclass by lightning-utilities and for a mapping by accelerate. Whatever has a dtype is a
    tensor to accelerate.
    """

    def again(value: object) -> object:
        return rebuilt(value, function, dataclasses_first)

    if isinstance(data, torch.Tensor) or hasattr(data, "dtype"):
        return function(data)
    if dataclasses.is_dataclass(data) and (dataclasses_first or not isinstance(data, Mapping)):
        result = copy.copy(data)
        for field in dataclasses.fields(data):
            setattr(result, field.name, again(getattr(data, field.name)))
        return result
    if isinstance(data, Mapping):
        return type(data)(OrderedDict((name, again(value)) for name, value in data.items()))  # type: ignore[call-arg]
    if isinstance(data, (tuple, list)):
        return type(data)(map(again, data))
    return data


@pytest.mark.parametrize("dataclasses_first", [False, True])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_outputs_survive_generic_container_code(variant: str, dataclasses_first: bool) -> None:
    output = make_layer(variant)(tokens(SHAPE), 1.0, SHAPE)
    batch = {"batch": [output, compose([output.assignment]), output.grid]}
    cast, chain, grid = rebuilt(batch, torch.Tensor.half, dataclasses_first)["batch"]
    assert isinstance(cast, GroupingOutput)
    assert cast.x_out.dtype == torch.float16
    assert output.x_out.dtype == torch.float32
    assert list(cast) == FIELDS
    assert cast.grid == grid == output.grid
    assert chain.num_groups == output.assignment.num_groups
    values = torch.randn(2, 15, 2)
    want = output.assignment.upsample(values)
    assert torch.equal(cast.assignment.upsample(values), want)
    copied = copy.deepcopy(output.detach())
    for again in (reloaded(output.detach()), copied, pickle.loads(pickle.dumps(output.detach()))):
        assert torch.equal(again.assignment.upsample(values), want)
        assert again.grid == output.grid
    with pytest.raises(TypeError, match=r"must have the keys .*; got \['x_out'\]"):
        GroupingOutput({"x_out": output.x_out})


def reloaded(data: object) -> object:
    """Saved and loaded with torch's defaults."""
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_everything_is_loaded_by_default(variant: str) -> None:
    layer = make_layer(variant, relative_bias=variant != "dense")
    valid = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3)) < 0.8
    for spacing in (0.5, torch.tensor([[1.0, 0.5], [0.25, 1.0]])):
        output = layer(tokens(SHAPE), spacing, SHAPE, valid=valid).detach()
        members, chain, usage = output.assignment, compose([output.assignment]), output.assignment.usage()
        again = reloaded({"out": output, "all": (chain, output.grid, usage, layer.neighbourhood(SHAPE))})
        assert torch.equal(again["out"].x_out, output.x_out)
        assert torch.equal(again["out"].assignment.matrix(), members.matrix())
        loaded_chain, grid, loaded_usage, neighbourhood = again["all"]
        assert torch.equal(loaded_chain.labels(), chain.labels())
        assert grid == output.grid
        assert torch.equal(loaded_usage.mass, usage.mass)
        assert neighbourhood == layer.neighbourhood(SHAPE)
