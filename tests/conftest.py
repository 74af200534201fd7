"""Makes the scripts under test and the tests' own tiny components importable."""

import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
for folder in ("examples", "benchmarks", "conversion_scripts", "tests"):
    sys.path.insert(0, str(ROOT / folder))

# Tensors of a few thousand numbers: handing them to threads costs more than it saves.
torch.set_num_threads(1)
