"""The pipeline that comes with the repository does what its card says."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rq_draft_revise import DraftAndRevisePipeline


FOLDER = Path(__file__).resolve().parents[1] / "pipelines" / "emoji-scenes"


@pytest.fixture(scope="module")
def pipe():
    pipe = DraftAndRevisePipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_float16_and_small():
    files = [path for path in FOLDER.glob("**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) >= 2
    for path in weights:
        with safe_open(path, "pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, no dictionary
        # the RQ-VAE's codebook and its moving averages are never rounded
        assert {dtype for name, dtype in dtypes.items() if not name.startswith("quantizer.")} == {"F16"}, path


def test_card_has_what_a_user_asks_first():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("license: apache-2.0", "## Data", "## Training", "## Results", "## Limits", "train_cc3m.py"):
        assert part in card, part


def test_the_prompt_decides_the_backdrop(pipe):
    """Real scenes in the snow are the brightest, those at night the darkest; so must be the pictures of a prompt."""
    backdrops = ["in the snow", "on the grass", "at dusk", "at night"]
    prompts = [f"{thing} {backdrop}" for thing in ("a volcano", "a penguin", "an apple") for backdrop in backdrops]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=8, num_revisions=1, generator=generators, output_type="pt").images
    assert images.shape == (12, 3, 64, 64) and images.isfinite().all()
    brightness = images.mean(dim=(1, 2, 3)).view(3, 4)
    assert (brightness[:, 0] > brightness[:, 1]).all()
    assert (brightness[:, 1] > brightness[:, 2]).all()
    assert (brightness[:, 2] > brightness[:, 3]).all()
    by_place = images.unflatten(0, (3, 4))  # (objects, backdrops, 3, 64, 64)
    red, green, blue = by_place[:, backdrops.index("at dusk"), :, :12].mean(dim=(2, 3)).T  # a purple sky
    assert (red > green).all() and (blue > green).all()
    red, green, blue = by_place[:, backdrops.index("on the grass"), :, -8:].mean(dim=(2, 3)).T
    assert (green > red).all() and (green > blue).all()


def test_the_prompt_decides_the_object(pipe):
    """A red apple and a yellow-green frog: the middle of the picture has the object's hue."""
    prompts = ["an apple at night", "a frog at night"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipe(prompts, num_inference_steps=16, generator=generators, output_type="pt").images
    (apple_red, apple_green, _), (frog_red, frog_green, _) = images[:, :, 24:48, 24:40].mean(dim=(2, 3))
    assert apple_red > 1.5 * apple_green
    assert frog_green > 0.8 * frog_red
