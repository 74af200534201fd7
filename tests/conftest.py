"""Makes the scripts under test and the tests' own tiny components importable."""

import logging
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
for folder in ("examples", "benchmarks", "conversion_scripts", "tests"):
    sys.path.insert(0, str(ROOT / folder))

# Tensors of a few thousand numbers: handing them to threads costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_process_on_the_cpu(tmp_path_factory):
    """For modules that run scripts: accelerate without a GPU, and a cache of data sets of the module's own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setenv("HF_DATASETS_CACHE", cache)  # for processes that the tests start
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after each epoch of a stream
        yield


@pytest.fixture
def no_trace():
    """The scripts leave accelerate's state behind, and seed the global random state."""
    from components import forget_accelerator

    with torch.random.fork_rng(devices=[]):
        yield
    forget_accelerator()


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before, and none of the traces that dynamo writes where logs are kept, as pytest keeps them."""
    from torch._dynamo.utils import counters

    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    trace.setLevel(level)
