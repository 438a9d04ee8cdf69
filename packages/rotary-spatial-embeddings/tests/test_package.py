"""What a user gets from installing and importing the package."""

import subprocess
import sys

import RoSE

ALONE = """
import sys
CLOSED = {"numpy", "timm", "einops", "matplotlib", "triton", "torchvision", "scipy", "transformers", "x_transformers"}
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in CLOSED:
            raise ModuleNotFoundError(f"{name} is closed in this test", name=name)
sys.meta_path.insert(0, Closed())
import warnings; warnings.simplefilter("ignore")  # torch remarks on the missing numpy
import torch, RoSE
out = RoSE.RotarySpatialEmbedding(32, 2, 2)(torch.randn(1, 6, 32), 0.5, (2, 3))
out.sum().backward()
block = RoSE.MultiResolutionBlock(32, 2, 2)
assert block(torch.randn(1, 6, 32), 0.5, (2, 3)).shape == (1, 6, 32)
import RoSE.adapters
rope = RoSE.adapters.TimmRope(32, 2)
assert rope.get_embed((2, 3)).shape == (2, 6, 32)
loaded = {m.partition(".")[0] for m in sys.modules}
assert "spatial_grouping_attention" not in loaded, loaded
print("alone")
"""


def test_runs_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "alone", done.stderr


def test_public_names() -> None:
    names = {
        "AliasingWarning",
        "Grid",
        "MultiResolutionBlock",
        "RoSEMultiHeadAttention",
        "RoSEMultiHeadCrossAttention",
        "RotarySpatialEmbedding",
        "__version__",
        "augment_coordinates",
        "frequency_groups",
        "functional",
    }
    assert set(RoSE.__all__) == names
    assert all(getattr(RoSE, name).__doc__ for name in names - {"__version__"})
    assert {"phases", "cos_sin", "rotate"} == set(RoSE.functional.__all__)
