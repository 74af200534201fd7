"""The picture of the two phases shows what the sampler does."""

import pytest
import torch
import two_phases
from components import tiny_pipeline
from PIL import Image


MASK = 50  # of the tiny pipeline: 4×4 positions
SAMPLING = dict(num_inference_steps=4, num_revise_steps=2, num_revisions=2)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline("text")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def steps(pipe):
    return two_phases.draw_steps(pipe, "a cat at dusk", 3, **SAMPLING)


def masked(codes: torch.Tensor) -> set[int]:
    return set((codes[0, ..., 0] == MASK).flatten().nonzero().flatten().tolist())


def test_a_draft_sees_the_blocks_before_its_own(steps):
    draft, _ = steps
    blocks = [set(step.block.tolist()) for step in draft]
    assert sorted(position for block in blocks for position in block) == list(range(16))
    for i, step in enumerate(draft):
        assert masked(step.seen) == set().union(*blocks[i:])
        assert masked(step.codes) == set().union(*blocks[i + 1 :])


def test_a_revision_sees_all_but_its_block(steps):
    draft, revisions = steps
    assert len(revisions) == 4
    before = [draft[-1], *revisions]
    for last, step in zip(before, revisions):
        block = step.block.tolist()
        assert masked(step.seen) == set(block) and not masked(step.codes)
        kept = [position for position in range(16) if position not in block]
        assert torch.equal(step.codes.flatten(1, 2)[:, kept], last.codes.flatten(1, 2)[:, kept])


def test_the_last_codes_are_those_of_the_call(pipe, steps):
    generator = torch.Generator().manual_seed(3)
    images = pipe("a cat at dusk", generator=generator, output_type="latent", **SAMPLING).images
    assert torch.equal(steps[1][-1].codes, images)


def test_equal_stacks_have_equal_colours_and_masked_ones_none(pipe, steps):
    draft, revisions = steps
    palette = two_phases.Palette(pipe.vae, [step.codes for step in draft + revisions])
    codes = draft[1].codes.clone()
    codes[0, 0, 0] = codes[0, 1, 1] = revisions[-1].codes[0, 2, 2]
    colours = palette(codes)
    assert colours[0] == colours[5] != two_phases.EMPTY
    assert {i for i, colour in enumerate(colours) if colour == two_phases.EMPTY} == masked(codes)


@pytest.mark.parametrize("num_steps, shown", [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (8, [0, 2, 5, 7])])
def test_steps_are_spread_over_the_phase(num_steps, shown):
    assert two_phases.spread(num_steps) == shown


def test_the_script_writes_a_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    output = tmp_path / "sheet.png"
    flags = ["--num-inference-steps", "4", "--num-revise-steps", "2", "--num-revisions", "1"]
    two_phases.main(["a cat", "--pipeline", str(tmp_path / "pipeline"), "--output", str(output), *flags])
    with Image.open(output) as picture:
        picture.load()
        assert picture.width < 1000


def test_more_than_one_prompt_is_refused(capsys):
    with pytest.raises(SystemExit):
        two_phases.parse_args(["a cat", "an owl"])
    assert capsys.readouterr().err == "error: the picture is of one prompt, got 2\n"
