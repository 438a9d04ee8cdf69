"""The interactive page: what is exported is what torch computes, and what is committed is what the page reads."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from skimage import io
from spatial_grouping_attention.models import grouping_vit_nano

sys.path.insert(0, str(Path(__file__).parent))

from coins_data import Crops, coins
from interactive_ballast import without_ballast
from interactive_export import LONGEST, SIZE, Graph, describe_grouping, exported, output_names, waves
from interactive_network import ASSETS, SEEN, examples, instances, main, make_network, train

# The exporter's own.
QUIET = (f"ignore::{kind}Warning" for kind in ("Deprecation", "Future", "User"))
pytestmark = [pytest.mark.training, pytest.mark.filterwarnings(*QUIET)]
SMALL = (32, 48)


def run(model, image):
    """Outputs by name, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image}), strict=True))


def matrix(grouping, memberships):
    """Memberships of all pairs, by the rule that the page follows (memberships.js)."""
    (rows, columns), (high, wide), (down, across) = (grouping[name] for name in ("tokens", "window", "periods"))
    full = np.zeros((rows, columns, *grouping["groups"]), np.float32)
    for r in range(rows):
        for c in range(columns):
            for i, j in np.ndindex(*grouping["groups"]):
                near = abs(i - grouping["cells"][0][r]) <= high // 2 and abs(j - grouping["cells"][1][c]) <= wide // 2
                if near:
                    full[r, c, i, j] = memberships[r * columns + c, (i % down) * across + j % across]
    return full.reshape(rows * columns, -1)


@pytest.fixture(scope="module")
def trained():
    """A small network after a few steps, and an image that it was not trained on."""
    torch.manual_seed(0)
    network = grouping_vit_nano(
        2, 1, 2, dims=(8, 8, 16), depths=(0, 0, 0), num_heads=(1, 2, 2), grouping=("sparse", "dense"), head="panoptic"
    )
    seen, unseen = instances(coins()).split(SEEN)
    losses = []
    train(network, Crops(seen, SMALL[0], 0), 3, 2, losses.append)
    assert len(losses) == 3
    image = torch.from_numpy(unseen.image[20 : 20 + SMALL[0], : SMALL[1]].copy())[None, None]
    return network.eval(), image


@pytest.fixture(scope="module")
def models(trained):
    """The graph as exported, and the smaller file of it."""
    model = exported(trained[0], SMALL)
    large = model.SerializeToString()
    return large, without_ballast(model).SerializeToString()


@pytest.mark.slow
def test_another_runtime_agrees_on_all_outputs(trained, models):
    network, image = trained
    found = run(models[0], image.numpy())
    with torch.no_grad():
        wanted = Graph(network)(image)
    assert list(found) == list(wanted) == output_names(2)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value.numpy()).max() <= 1e-5, name


@pytest.mark.slow
def test_a_smaller_file_computes_the_same_bit_for_bit(trained, models):
    large, small = models
    assert len(small) < 0.7 * len(large)
    image = trained[1].numpy()
    one, other = run(large, image), run(small, image)
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_colours_and_cells_say_all_memberships(trained, models):
    network, image = trained
    found = run(models[1], image.numpy())
    with torch.no_grad():
        assignments = network(image).assignments
    for stage, assignment in enumerate(assignments, 1):
        pairs = matrix(describe_grouping(assignment, 1), found[f"memberships{stage}"])
        assert np.abs(pairs - assignment.matrix()[0].numpy()).max() <= 1e-5


@pytest.mark.slow
def test_labels_are_nested(trained, models):
    found = run(models[1], trained[1].numpy())
    fine, coarse = found["labels1"], found["labels2"]
    assert all(len(set(coarse[fine == group])) == 1 for group in np.unique(fine))


def assert_coins_are_groups(coins, groups):
    """One of the last groups holds nearly all of every coin that the image does not cut off, and little else."""
    pixels = groups.repeat(2, 0).repeat(2, 1)
    inner = set(np.unique(coins)) - {0, *coins[:, 0], *coins[:, -1], *coins[0], *coins[-1]}
    assert len(inner) >= 3
    for coin in inner:
        group = np.bincount(pixels[coins == coin]).argmax()
        common = ((coins == coin) & (pixels == group)).sum()
        assert common / ((coins == coin) | (pixels == group)).sum() > 0.9


def test_what_is_committed_is_what_the_page_reads():
    described = json.loads((ASSETS / "network.json").read_text())
    model = (ASSETS / "network.onnx").read_bytes()
    assert len(model) <= 3_000_000
    assert tuple(described["size"]) == SIZE
    split = instances(coins()).split(SEEN)
    for shown, example in zip(described["images"], examples(*split), strict=True):
        image = io.imread(ASSETS / shown["file"])
        assert np.array_equal(image, (255 * example.image).round())
        found = run(model, (image / 255).astype(np.float32)[None, None])
        assert list(found) == output_names(len(described["groupings"]))
        coin = found["classes"][1] > 0.5
        wanted = example.labels > 0
        assert (coin & wanted).sum() / (coin | wanted).sum() > 0.9
        assert_coins_are_groups(example.labels, found["labels3"].reshape(described["groupings"][0]["tokens"]))
        for stage, grouping in enumerate(described["groupings"], 1):
            memberships, labels = found[f"memberships{stage}"], found[f"labels{stage}"]
            assert memberships.shape == (np.prod(grouping["tokens"]), np.prod(grouping["periods"]))
            assert np.abs(memberships.sum(1) - 1).max() <= 1e-5
            assert labels.shape == (np.prod(described["groupings"][0]["tokens"]),)
            assert labels.dtype == np.int32
            assert 0 <= labels.min() <= labels.max() < np.prod(grouping["groups"])
            assert [len(cells) for cells in grouping["cells"]] == grouping["tokens"]


def test_waves_are_those_of_a_network_from_short_to_long():
    network = make_network()
    shown = waves(network)
    lengths = [wave["wavelength"] for wave in shown]
    assert lengths == sorted(lengths)
    assert 2 * shown[0]["pixels"] <= lengths[0] <= lengths[-1] <= LONGEST
    known = network.stages[-2].blocks[0].attention.rotary.freqs.flatten(0, 1).tolist()
    for wave in shown:
        assert wave["vector"] in known
        assert wave["wavelength"] * np.hypot(*wave["vector"]) == pytest.approx(2 * np.pi)


def test_options_that_make_no_sense(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps must be at least 1; got 0" in capsys.readouterr().err


def test_another_package_is_not_unpacked(tmp_path):
    path = ASSETS.parent / "fetch_runtime.py"
    spec = importlib.util.spec_from_file_location("fetch_runtime", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "other.tgz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"must have the digest sha512-.*; got sha512-"):
        module.unpack(tmp_path / "other.tgz", tmp_path / "runtime")
    assert not (tmp_path / "runtime").exists()
