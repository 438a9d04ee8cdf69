"""Primus' own module; to be imported before all else that imports torchvision, which fails beside another torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "rotary-spatial-embeddings" / "tests"))

import peers

Primus = peers.beside_torchvision("dynamic_network_architectures.architectures.primus").Primus
