"""The examples that draw the figures of the paper's supplement: each shows what it says."""

import re
import shlex
from pathlib import Path

import caption_grid
import contact_sheet
import draft_steps
import emoji_scenes
import infill_random_mask
import inpaint_regions
import numpy as np
import pytest
import torch
from components import random_pixels, tiny_pipeline
from PIL import Image

from rq_draft_revise import DraftAndRevisePipeline, DraftAndReviseScheduler


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    f"examples/{module.__name__}.py": module
    for module in (draft_steps, caption_grid, inpaint_regions, infill_random_mask)
}
MASK = 50  # of the tiny pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline, saved: 8×8 pixels, 4×4 positions."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("text").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = DraftAndRevisePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def draw(folder, tmp_path, monkeypatch):
    """Runs a script and returns the sections, captions and labels of its sheet: the pictures, not their places."""

    def draw(module, *argv):
        seen = {}

        def record(sections, captions, labels=(), **kwargs):
            seen.update(sections=sections, captions=captions, labels=labels, **kwargs)
            return contact_sheet.draw_sheet(sections, captions, labels, **kwargs)

        monkeypatch.setattr(module, "draw_sheet", record)
        output = tmp_path / "sheets" / "sheet.png"
        arguments = [str(argument) for argument in argv]
        assert module.main([*arguments, "--pipeline", str(folder), "--output", str(output)]) == 0
        with Image.open(output) as sheet:
            sheet.load()
            assert sheet.format == "PNG"
        return seen

    return draw


def alone(pipe, prompt: str, seed: int, **arguments) -> Image.Image:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images[0]


def assert_same(image: Image.Image, expected: Image.Image) -> None:
    # The codes are equal. The decoder's sums run in another order in another batch: one level of 256 may flip.
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def is_covered(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) == contact_sheet.COVER).all(axis=-1)


# The sheets


def test_the_steps_of_a_draft_and_what_is_masked_after_each(draw, pipe):
    prompts, steps = ["a cat", "the owl at night"], dict(num_inference_steps=8)
    flags = ["--num-inference-steps", 8, "--every", 3, "--selections", "top-c", "random", "--seed", 5]
    seen = draw(draft_steps, *prompts, *flags)
    assert seen["captions"] == ["3 of 8 steps", "6 of 8 steps", "draft, 8 steps", "revision 1"]
    assert seen["labels"] == ["top-c", "", "random", ""] * 2
    assert [title for title, _ in seen["sections"]] == prompts
    for i, (prompt, rows) in enumerate(seen["sections"]):
        for selection, masks, images in (("top-c", *rows[:2]), ("random", *rows[2:])):
            # 2 of 16 positions a step, of 2×2 pixels each; a revision leaves no mask
            assert [is_covered(mask).sum() // 4 for mask in masks[:3]] == [10, 4, 0] and masks[3] is None
            positions = [is_covered(mask)[::2, ::2] for mask in masks[:3]]
            assert all((later <= earlier).all() for earlier, later in zip(positions, positions[1:]))
            arguments = dict(selection=selection, **steps)
            assert_same(images[2], alone(pipe, prompt, 5 + i, num_revisions=0, **arguments))
            assert_same(images[3], alone(pipe, prompt, 5 + i, **arguments))


def test_the_mask_pattern_is_that_of_the_codes():
    codes = torch.zeros(1, 4, 4, 3, dtype=torch.int64)
    codes[0, 1, 2:] = codes[0, 3, 0] = MASK
    pattern = is_covered(draft_steps.draw_mask(codes, MASK, size=(8, 8)))
    expected = (codes[0, ..., 0] == MASK).numpy().repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(pattern, expected)


def test_a_row_of_the_grid_is_a_caption_and_a_column_a_seed(draw, pipe):
    prompts = ["a cat at night", "a cat at dusk", "the cat at dusk"]
    seen = draw(caption_grid, *prompts, "--num-images", 2, "--seed", 3)
    assert [title for title, _ in seen["sections"]] == prompts
    for prompt, (row,) in seen["sections"]:
        assert len(row) == 2
        for column, image in enumerate(row):
            assert_same(image, alone(pipe, prompt, 3 + column))
    assert seen["marked"] == {"a", "the", "night", "dusk"}


def test_regions_are_filled_and_nothing_else_changes(draw, pipe):
    prompts = ["a cat at night", "a rocket"]
    seen = draw(inpaint_regions, *prompts, "--fill-prompts", "a cat at night", "an owl", "--seed", 3)
    assert seen["captions"] == ["image", "bottom", "filled", "centre", "filled", "outside", "filled"]
    assert [title for title, _ in seen["sections"]] == ["a cat at night", "a rocket, filled as an owl"]
    regions = {name: np.zeros((8, 8), dtype=bool) for name in ("bottom", "centre", "outside")}
    regions["bottom"][4:] = regions["centre"][2:6, 2:6] = True
    regions["outside"] = ~regions["centre"]
    for i, (_, ((image, *rest),)) in enumerate(seen["sections"]):
        assert_same(image, alone(pipe, prompts[i], 3 + i))
        before = np.asarray(image)
        for name, covered, filled in zip(seen["captions"][1::2], rest[::2], rest[1::2]):
            region, after = regions[name], np.asarray(filled)
            assert np.array_equal(is_covered(covered), region)
            assert np.array_equal(np.asarray(covered)[~region], before[~region])
            assert np.array_equal(after[~region], before[~region]) and not np.array_equal(after, before)


def test_half_of_the_positions_is_infilled_and_the_other_half_kept(draw):
    seen = draw(infill_random_mask, "a cat at night", "a rocket", "--num-masks", 2)
    assert seen["captions"] == ["image", "half of it", "infilled"] * 2
    patterns = []
    for _, (row,) in seen["sections"]:
        for image, covered, filled in (row[:3], row[3:]):
            region, before, after = is_covered(covered), np.asarray(image), np.asarray(filled)
            positions = region.reshape(4, 2, 4, 2)
            assert (positions.all(axis=(1, 3)) == positions.any(axis=(1, 3))).all() and region.sum() == 32
            patterns.append(region.tobytes())
            assert np.array_equal(after[~region], before[~region]) and not np.array_equal(after, before)
    assert len(set(patterns)) == 4


@pytest.mark.parametrize("module", [inpaint_regions, infill_random_mask])
def test_a_fill_does_not_have_the_seed_of_its_image(draw, monkeypatch, module):
    """By the same numbers it would find again what is covered, and look better than it is."""
    seeds, set_partitions = [], DraftAndReviseScheduler.set_partitions

    def record(self, sample, mask_token_id, generator, **kwargs):
        seeds.append([one.initial_seed() for one in generator])
        return set_partitions(self, sample, mask_token_id, generator, **kwargs)

    monkeypatch.setattr(DraftAndReviseScheduler, "set_partitions", record)
    draw(module, "a cat", "a rocket", "--seed", 7)
    images, *fills = seeds
    assert images == [7, 8] and len(fills) >= 2
    assert len({seed for row in seeds for seed in row}) == 2 * len(seeds)


@pytest.mark.parametrize("module", [inpaint_regions, infill_random_mask])
def test_files_take_the_place_of_drawn_images(draw, tmp_path, module):
    pixels = ((random_pixels(1, 20)[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype("uint8")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "photo.png")
    seen = draw(module, "a cat", "--images", tmp_path / "photo.png")
    ((_, (row,)),) = seen["sections"]
    assert_same(row[0], Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS))


# Mistakes


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (draft_steps, ["--num-inference-steps", "17"], "`num_inference_steps` must lie in [1, 16]"),
        (draft_steps, ["--selections", "bottom-c"], "`selection` must be one of"),
        (inpaint_regions, ["--images", "no-such-file.png"], "cannot read the image no-such-file.png"),
        (inpaint_regions, ["--images", __file__], "cannot read the image"),
        (inpaint_regions, ["--images", "a.png", "b.png"], "--images must be 1, one a prompt, got 2"),
        (infill_random_mask, ["--output", "sheet.jpg"], "--output must name a .png file"),
        (caption_grid, ["--device", "abacus"], "--device abacus cannot be used"),
        (caption_grid, ["--pipeline", "no-such-folder"], "no pipeline at no-such-folder"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, monkeypatch, module, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        module.main(["a cat", "--pipeline", str(folder), "--output", "sheet.png", *flags])
    text = exit.value.code
    assert isinstance(text, str) and text.startswith("error: ") and "\n" not in text and message in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", SCRIPTS.values())
@pytest.mark.parametrize("flags", [[" "], ["a cat", "--seed", "-1"], ["a cat", "--every-so-often", "3"]])
def test_a_wrong_flag_is_one_line_and_status_2(capsys, module, flags):
    with pytest.raises(SystemExit) as exit:
        module.main(flags)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_as_many_prompts_to_fill_with_as_images(capsys):
    with pytest.raises(SystemExit):
        inpaint_regions.main(["a cat", "--fill-prompts", "an owl", "a rocket"])
    assert capsys.readouterr().err == "error: --fill-prompts must be 1, one a prompt, got 2\n"


# The figures of the documentation


def commands_of(text: str) -> list[list[str]]:
    """Each `python examples/... --output docs/images/figure-...` of a text, as the words after `python`."""
    found = re.findall(r"python (examples/(?:.*\\\n)*.*)$", text, re.M)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


def documented_commands() -> list[list[str]]:
    return commands_of((ROOT / "docs" / "figures.md").read_text(encoding="utf-8"))


def test_make_figures_runs_the_documented_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = re.search(r"^figures:.*\n((?:\t.*\n|(?<=\\\n).*\n)+)", makefile, re.M).group(1)
    pages = ("quickstart", "how-it-works", "figures")
    commands = [c for page in pages for c in commands_of((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))]
    assert commands_of(rule) == [command for command in commands if command[-1].startswith("docs/images/")]
    assert {script for script, *_ in documented_commands()} == set(SCRIPTS)


@pytest.mark.parametrize("number", range(len(documented_commands())))
def test_a_documented_figure_is_there_and_small_and_of_words_that_the_pipeline_knows(number):
    script, *flags = documented_commands()[number]
    args = SCRIPTS[script].parse_args(flags)
    assert f"]({args.output.relative_to('docs')})" in (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    with Image.open(ROOT / args.output) as figure:
        figure.load()
        assert max(figure.size) < 1400
    assert (ROOT / args.output).stat().st_size < 400_000
    objects, backdrops = list(emoji_scenes.OBJECTS)[:40], list(emoji_scenes.BACKDROPS)[:6]
    known = {emoji_scenes.captions(name, backdrop)[0] for name in objects for backdrop in backdrops}
    prompts = [*args.prompts, *getattr(args, "fill_prompts", []), *SCRIPTS[script].PROMPTS]
    assert set(prompts) <= known
