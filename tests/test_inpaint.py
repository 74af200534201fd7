"""DraftAndReviseInpaintPipeline: nothing outside a mask changes, and what is inside is drawn as without one."""

import logging

import numpy as np
import pytest
import torch
from components import CONDITIONS, NUM_CLASSES, random_pixels, tiny_pipeline
from PIL import Image

from rq_draft_revise import DraftAndReviseInpaintPipeline, DraftAndRevisePipeline


SELECTIONS = ("random", "top-c", "top-c-50%")
CONDITION = {"text": dict(prompt="the owl at night"), "class": dict(class_labels="alias 3"), None: {}}


@pytest.fixture(scope="module")
def bases():
    pipes = {condition: tiny_pipeline(condition) for condition in CONDITIONS}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def pipes(bases):
    """With the components of `bases`."""
    pipes = {
        condition: DraftAndReviseInpaintPipeline(**pipe.components, id2label=pipe.config.id2label)
        for condition, pipe in bases.items()
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes["text"]


@pytest.fixture
def warnings_of_the_pipeline(caplog):
    logger = logging.getLogger("rq_draft_revise.pipeline_draft_and_revise_inpaint")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def photo(seed: int = 0, size: int = 8) -> Image.Image:
    pixels = random_pixels(1, size, seed)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(((pixels + 1) * 127.5).round().astype("uint8"))


def box(left: int, top: int, right: int, bottom: int, size: int = 8) -> Image.Image:
    """White inside, black outside."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (left, top, right, bottom))
    return mask


def white(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask) >= 128


def codes_of(pipe, *args, **kwargs) -> torch.Tensor:
    return pipe(*args, **kwargs, output_type="latent").images


def encode(pipe, *images: Image.Image) -> torch.Tensor:
    pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / np.float32(255)
    with torch.no_grad():
        return pipe.vae.encode(2 * torch.from_numpy(pixels) - 1).codes


# Outside and inside


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_nothing_outside_its_mask_changes(pipes, condition, selection):
    pipe, images, masks = pipes[condition], [photo(1), photo(2)], [box(3, 2, 5, 7), box(0, 0, 8, 3)]
    guidance = {} if condition is None else dict(guidance_scale=2.0, draft_guidance_scale=1.5)
    arguments = dict(CONDITION[condition], selection=selection, num_revisions=2, **guidance)
    codes = codes_of(pipe, images, masks, generator=generators(1, 2), **arguments)
    known = encode(pipe, *images)
    # a position is masked if any of its 2×2 pixels is
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[0, 1:4, 1:3] = region[1, :2] = True
    assert torch.equal(codes[~region], known[~region]) and not torch.equal(codes[region], known[region])
    assert (codes < pipe.transformer.mask_token_id).all()

    for output_type in ("pil", "np", "pt"):
        filled = pipe(images, masks, generator=generators(1, 2), output_type=output_type, **arguments).images
        for image, mask, result in zip(images, masks, filled):
            before, result = np.asarray(image), np.asarray(result)
            if output_type == "pt":
                result = result.transpose(1, 2, 0)
            if output_type != "pil":
                before = before / np.float32(255)
            assert result.dtype == before.dtype
            assert result[~white(mask)].tobytes() == before[~white(mask)].tobytes()
            assert not np.array_equal(result[white(mask)], before[white(mask)])
    # without compositing it is what the codes decode to
    decoded = pipe(images, masks, generator=generators(1, 2), output_type="pt", composite=False, **arguments).images
    assert torch.equal(decoded, pipe.decode_latents(codes, output_type="pt"))


def test_images_need_not_be_square():
    pipe = DraftAndReviseInpaintPipeline(**tiny_pipeline("text", height=2, width=3).components)
    pipe.set_progress_bar_config(disable=True)
    image, mask = photo().resize((6, 4)), box(4, 0, 6, 3, 6).crop((0, 0, 6, 4))  # PIL has the width first
    region = torch.tensor([[[False, False, True]] * 2])
    codes, known = codes_of(pipe, image, mask, "a cat", generator=generators(1)), encode(pipe, image)
    assert torch.equal(codes[~region], known[~region]) and not torch.equal(codes[region], known[region])
    assert torch.equal(codes_of(pipe, image, mask=region, prompt="a cat", generator=generators(1)), codes)
    (filled,) = pipe(image, mask, "a cat", generator=generators(1)).images
    assert filled.size == image.size
    assert np.array_equal(np.asarray(filled)[~white(mask)], np.asarray(image)[~white(mask)])
    (larger,) = pipe(image.resize((12, 8)), mask.resize((12, 8)), "a cat", output_type="latent").images
    assert larger.shape == codes.shape[1:]


@pytest.mark.parametrize("output_type", ["latent", "pt", "pil"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_all_white_mask_is_generation(bases, pipes, condition, output_type):
    for selection in SELECTIONS:
        arguments = dict(CONDITION[condition], selection=selection, output_type=output_type)
        drawn = bases[condition](generator=generators(5), **arguments).images
        filled = pipes[condition](photo(), box(0, 0, 8, 8), generator=generators(5), **arguments).images
        assert np.array_equal(np.asarray(filled[0]), np.asarray(drawn[0]))


def test_an_all_black_mask_returns_the_input_and_says_so(pipe, warnings_of_the_pipeline):
    arguments = dict(generator=generators(1), num_inference_steps=3, num_revise_steps=2, num_revisions=2)
    (same,) = pipe(photo(), box(0, 0, 0, 0), "a cat", **arguments).images
    assert same.tobytes() == photo().tobytes() and pipe.num_timesteps == 0
    assert "The mask is empty for image(s) [0] of 1: nothing to fill there." in warnings_of_the_pipeline.text
    assert torch.equal(codes_of(pipe, photo(), box(0, 0, 0, 0), "a cat"), encode(pipe, photo()))
    warnings_of_the_pipeline.clear()
    pipe(photo(), box(0, 0, 1, 1), "a cat")
    assert warnings_of_the_pipeline.text == ""


def test_images_with_an_empty_mask_are_named_and_come_back(pipe, warnings_of_the_pipeline):
    masks = [box(0, 0, 0, 0), box(0, 0, 8, 4), box(0, 0, 0, 0)]
    images = pipe([photo(1), photo(2), photo(3)], masks, "a cat", generator=generators(1, 2, 3)).images
    assert "The mask is empty for image(s) [0, 2] of 3: nothing to fill there." in warnings_of_the_pipeline.text
    assert [image.tobytes() == photo(i).tobytes() for i, image in enumerate(images, 1)] == [True, False, True]


def test_there_are_as_many_steps_as_asked_for_and_a_tuple_holds_the_same_images(pipe):
    for num_inference_steps, num_revise_steps, num_revisions in ((5, 1, 0), (1, 3, 2), (8, 8, 1)):
        steps = dict(num_inference_steps=num_inference_steps, num_revise_steps=num_revise_steps)
        arguments = dict(steps, num_revisions=num_revisions, prompt="a cat", output_type="latent")
        images = pipe(photo(), box(0, 0, 8, 4), generator=generators(1), **arguments).images
        assert pipe.num_timesteps == num_inference_steps + num_revisions * num_revise_steps
        same = pipe(photo(), box(0, 0, 8, 4), generator=generators(1), return_dict=False, **arguments)
        assert isinstance(same, tuple) and len(same) == 1 and torch.equal(same[0], images)


def test_a_saved_default_of_no_draft_steps_still_drafts_what_is_masked():
    base = tiny_pipeline("text", scheduler=dict(num_inference_steps=0, num_revise_steps=1, num_revisions=2))
    pipe = DraftAndReviseInpaintPipeline(**base.components)
    pipe.set_progress_bar_config(disable=True)
    codes = codes_of(pipe, photo(), box(0, 0, 8, 4), "a cat", generator=generators(1))
    assert pipe.num_timesteps == 1 + 2 and (codes < pipe.transformer.mask_token_id).all()


def test_each_step_changes_only_masked_positions_and_the_draft_takes_each_once(pipe):
    stages = []

    def watch(pipe, step, timestep, kwargs):
        stages.append(kwargs["latents"])
        return kwargs

    mask = box(2, 2, 8, 8)  # 9 positions
    pipe(
        photo(),
        mask,
        "a cat",
        num_inference_steps=4,
        num_revise_steps=2,
        num_revisions=3,
        callback_on_step_end=watch,
    )
    assert len(stages) == pipe.num_timesteps == 4 + 3 * 2
    left = [int((codes[..., 0] == pipe.transformer.mask_token_id).sum()) for codes in stages]
    assert left == [7, 5, 3, 0] + [0] * 6
    for before, after in zip(stages, stages[1:]):
        changed = (before != after).any(dim=-1)
        assert not changed[:, 0].any() and not changed[:, :, 0].any() and changed.sum() <= 5


REGIONS = {name: np.zeros((8, 8), dtype=bool) for name in ("bottom", "centre", "outside", "scattered")}
REGIONS["bottom"][5:] = REGIONS["centre"][3:5, 2:7] = True
REGIONS["outside"] = ~REGIONS["centre"]
REGIONS["scattered"][[0, 1, 4, 7, 7], [0, 7, 3, 4, 5]] = True  # single pixels, two of them at one position


@pytest.mark.parametrize("name", REGIONS)
def test_the_transformer_is_asked_for_the_masked_positions_alone_and_once_a_phase(pipe, name):
    pixels, asked = REGIONS[name], []
    positions = pixels.reshape(4, 2, 4, 2).any(axis=(1, 3)).flatten().nonzero()[0].tolist()
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(args[1][0].tolist()) if len(args) > 1 else None, with_kwargs=True
    )
    try:
        (filled,) = pipe(photo(), pixels, "a cat", num_revise_steps=2, num_revisions=2, generator=generators(1)).images
    finally:
        hook.remove()
    draft = asked[: pipe.scheduler.num_inference_steps]
    revisions = asked[len(draft) :]
    for phase in (draft, revisions[:2], revisions[2:]):
        assert sorted(position for block in phase for position in block) == positions
    after, before = np.asarray(filled), np.asarray(photo())
    assert np.array_equal(after[~pixels], before[~pixels]) and not np.array_equal(after[pixels], before[pixels])


@pytest.mark.parametrize("condition", ["text", "class"])
def test_another_condition_edits_the_region_and_nothing_else(pipes, condition):
    own, other = (
        (dict(prompt="a cat"), dict(prompt="volcano at night"))
        if condition == "text"
        else (dict(class_labels=1), dict(class_labels=4))
    )
    codes = [
        codes_of(pipes[condition], photo(), box(2, 2, 8, 8), generator=generators(1), guidance_scale=2.0, **one)
        for one in (own, other)
    ]
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:, 1:] = True
    assert torch.equal(codes[0][:, ~inside], codes[1][:, ~inside])
    assert not torch.equal(codes[0][:, inside], codes[1][:, inside])


# Batches


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ragged_masks_in_a_batch_give_the_images_of_single_calls(pipe, selection):
    images = [photo(seed) for seed in range(4)]
    masks = [box(0, 0, 8, 8), box(3, 3, 4, 4), box(0, 0, 0, 0), box(0, 4, 8, 8)]
    prompts = ["a cat", "the owl at night", "volcano", "snow at dusk"]
    arguments = dict(guidance_scale=2.0, selection=selection)
    together = codes_of(pipe, images, masks, prompts, generator=generators(1, 2, 3, 4), **arguments)
    pixels = pipe(images, masks, prompts, generator=generators(1, 2, 3, 4), output_type="pt", **arguments).images
    for row in range(4):
        single = (images[row], masks[row], prompts[row])
        assert torch.equal(codes_of(pipe, *single, generator=generators(row + 1), **arguments)[0], together[row])
        alone = pipe(*single, generator=generators(row + 1), output_type="pt", **arguments).images
        torch.testing.assert_close(alone[0], pixels[row], atol=1e-4, rtol=0)


def test_one_of_a_kind_serves_all_the_others(pipe):
    images, masks, prompts = [photo(1), photo(2)], [box(0, 0, 4, 4), box(4, 0, 8, 8)], ["a cat", "snow"]
    for arguments in ((images, masks[0], prompts[0]), (images[0], masks, prompts[0]), (images[0], masks[0], prompts)):
        lists = [one if isinstance(one, list) else [one] * 2 for one in arguments]
        expected = codes_of(pipe, *lists, generator=generators(1, 2), guidance_scale=2.0)
        codes = codes_of(pipe, *arguments, generator=generators(1, 2), guidance_scale=2.0)
        assert torch.equal(codes, expected)
        # the images of a triple follow each other
        several = codes_of(
            pipe, *arguments, num_images_per_prompt=2, generator=generators(1, 3, 2, 4), guidance_scale=2.0
        )
        assert torch.equal(several[::2], expected) and not torch.equal(several[1::2], expected)
        filled = pipe(*arguments, num_images_per_prompt=2).images
        for row, (image, mask) in enumerate(zip(*lists[:2])):
            for result in filled[2 * row : 2 * row + 2]:
                assert np.array_equal(np.asarray(result)[~white(mask)], np.asarray(image)[~white(mask)])


# What an image and a mask may be


def test_input_types_agree(pipe):
    image, mask = photo(), box(2, 1, 5, 6)
    array, channels = np.asarray(image), np.asarray(image).transpose(2, 0, 1).copy()
    fraction, mask_array = array / np.float32(255), np.asarray(mask)
    expected = pipe(image, mask, "a cat", generator=generators(1), output_type="pt").images
    images = [
        image,
        [image],
        image.convert("RGBA"),
        array,
        fraction,
        fraction.astype(np.float64),
        fraction[None],
        [fraction],
        torch.tensor(channels),
        torch.tensor(channels) / 255,
        torch.tensor(channels)[None] / 255,
        [torch.tensor(channels) / 255],
    ]
    masks = [
        mask,
        [mask],
        mask.convert("1"),
        mask.convert("RGB"),
        mask_array,
        mask_array[..., None] / 255,
        mask_array[None] > 0,
        mask_array[None, ..., None],
        [mask_array > 0],
        torch.tensor(mask_array),
        torch.tensor(mask_array)[None] / 255,
        torch.tensor(mask_array)[None, None] > 0,
        [torch.tensor(mask_array)[None] > 0],
    ]
    for one in images:
        assert torch.equal(pipe(one, mask, "a cat", generator=generators(1), output_type="pt").images, expected)
    for one in masks:
        assert torch.equal(pipe(image, one, "a cat", generator=generators(1), output_type="pt").images, expected)


@pytest.mark.parametrize("size", [8, 40])
def test_a_uint8_mask_of_0_and_1_is_one_of_0_and_255(pipe, size):
    ones = np.zeros((2, size, size), dtype=np.uint8)
    ones[0, size // 2 :] = 1  # the second is empty
    images, arguments = [photo(1), photo(2)], dict(prompt="a cat", output_type="latent")
    expected = pipe(images, 255 * ones, generator=generators(1, 2), **arguments).images
    assert not torch.equal(expected[:1], encode(pipe, images[0])) and torch.equal(
        expected[1:], encode(pipe, images[1])
    )
    for mask in (ones, ones[..., None], list(ones), torch.tensor(ones), torch.tensor(ones)[:, None], ones > 0):
        assert torch.equal(pipe(images, mask, generator=generators(1, 2), **arguments).images, expected)
    assert torch.equal(pipe(images[0], ones[0], generator=generators(1), **arguments).images, expected[:1])
    # an image of 0 and 1 is nearly black
    assert (pipe.prepare_image(np.ones((8, 8, 3), dtype=np.uint8)) == torch.tensor(1) / 255).all()


def test_other_sizes_are_resized_and_no_masked_pixel_is_lost(pipe):
    image, small = photo(size=40), photo(size=40).resize((8, 8), Image.Resampling.LANCZOS)
    line = box(17, 0, 18, 40, size=40)  # one pixel of 40 is in column 3 of 8, of position 1 of 4
    codes = codes_of(pipe, image, line, "a cat", generator=generators(1))
    assert torch.equal(codes[:, :, [0, 2, 3]], encode(pipe, small)[:, :, [0, 2, 3]])
    assert not torch.equal(codes[:, :, 1], encode(pipe, small)[:, :, 1])
    (filled,) = pipe(image, line, "a cat", generator=generators(1)).images
    known = np.arange(8) != 3
    assert np.array_equal(np.asarray(filled)[:, known], np.asarray(small)[:, known])
    # images of a batch may differ in size, and a mask may be smaller than the model's
    both = codes_of(pipe, [image, small], [line, box(0, 0, 2, 2, size=4)], "a cat", generator=generators(1, 2))
    assert torch.equal(both[:1], codes)
    assert torch.equal(both[1, 2:], encode(pipe, small)[0, 2:]) and torch.equal(
        both[1, :, 2:], encode(pipe, small)[0, :, 2:]
    )


def test_arrays_and_tensors_are_resized_as_pil_images_are(pipe):
    image = photo(3, 2).resize((40, 40), Image.Resampling.BICUBIC)
    expected = pipe.prepare_image(image)
    for same in (np.array(image), torch.tensor(np.array(image)).permute(2, 0, 1) / 255):
        # between Lanczos and bicubic; the nearest pixel would be over 0.05 away
        torch.testing.assert_close(pipe.prepare_image(same), expected, atol=0.02, rtol=0)


def test_positions_may_be_masked_instead_of_pixels(pipe):
    positions = torch.zeros(2, 4, 4, dtype=torch.bool)
    positions[0, 1:3, 1:3] = positions[1, ::2, ::2] = True
    pixels = positions.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    images, arguments = [photo(1), photo(2)], dict(prompt="a cat", output_type="pt")
    by_position = pipe(images, mask=positions, generator=generators(1, 2), **arguments).images
    assert torch.equal(by_position, pipe(images, pixels, generator=generators(1, 2), **arguments).images)


def test_known_codes_take_the_place_of_encoding(pipe):
    mask, codes = box(0, 0, 8, 4), encode(pipe, photo())
    expected = codes_of(pipe, photo(), mask, "a cat", generator=generators(1))
    given = codes.clone()
    given[:, 0] = pipe.transformer.mask_token_id  # under the mask
    assert torch.equal(codes_of(pipe, photo(9), mask, "a cat", latents=given, generator=generators(1)), expected)
    given[:, 3, 3] = pipe.transformer.mask_token_id
    with pytest.raises(ValueError, match="`latents` must be known outside the mask, but 1 position"):
        pipe(photo(), mask, "a cat", latents=given)


# Steps


def test_a_callback_may_not_leave_holes(pipe):
    def mask_again(pipe, step, timestep, callback_kwargs):
        codes = callback_kwargs["latents"].clone()
        codes[0, 0, 0] = pipe.transformer.mask_token_id  # outside the mask, where nothing would fill it
        return {"latents": codes}

    message = r"`callback_on_step_end` must return `latents` that are masked where .* got 1 position\(s\) masked"
    with pytest.raises(ValueError, match=message):
        pipe(photo(), box(0, 4, 8, 8), "a cat", callback_on_step_end=mask_again)


def test_default_steps_shrink_to_the_region_and_larger_ones_are_refused(pipe):
    mask = box(0, 0, 3, 1)  # 2 positions
    pipe(photo(), mask, "a cat", num_revisions=3)
    assert pipe.scheduler.num_inference_steps == 2 and pipe.scheduler.num_revise_steps == 2
    pipe(photo(), box(0, 0, 1, 1), "a cat", num_revisions=3)
    assert pipe.num_timesteps == 1 + 3 * 1
    for name in ("num_inference_steps", "num_revise_steps"):
        with pytest.raises(ValueError, match=rf"`{name}` must lie in \[1, 2\], as the mask has 2 positions, got 3"):
            pipe(photo(), mask, "a cat", **{name: 3})
    with pytest.raises(ValueError, match=r"`num_inference_steps` must lie in \[1, 2\]"):
        pipe(photo(), mask, "a cat", num_inference_steps=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_known_pixels_too(dtype):
    pipe = DraftAndReviseInpaintPipeline(**tiny_pipeline("class").components).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    mask = box(0, 0, 8, 3)
    codebook = pipe.vae.quantizer.codebook.clone()
    (filled,) = pipe(photo(), mask, class_labels=3, guidance_scale=2.0, output_type="np").images
    assert np.isfinite(filled).all() and filled[white(mask)].std() > 0.01
    assert np.array_equal(filled[~white(mask)], np.asarray(photo())[~white(mask)] / np.float32(255))
    assert torch.equal(pipe.vae.quantizer.codebook, codebook) and pipe.vae.dtype == dtype


def test_saving_and_loading_keeps_everything(pipes, bases, tmp_path):
    arguments = dict(image=photo(), mask_image=box(2, 2, 6, 6), class_labels="alias 2")
    expected = codes_of(pipes["class"], **arguments, generator=generators(1))
    bases["class"].save_pretrained(tmp_path / "base")
    pipes["class"].save_pretrained(tmp_path / "inpaint")
    for name in ("base", "inpaint"):
        loaded = DraftAndReviseInpaintPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(codes_of(loaded, **arguments, generator=generators(1)), expected)
        assert loaded.get_label_ids("alias 2") == [2]


def test_from_pipe_takes_along_the_names_of_classes_and_draws_the_same(pipes, bases):
    base = bases["class"]
    inpaint = DraftAndReviseInpaintPipeline.from_pipe(base)
    inpaint.set_progress_bar_config(disable=True)
    assert all(inpaint.components[name] is component for name, component in base.components.items())
    assert inpaint.config.id2label == base.config.id2label and inpaint.get_label_ids("alias 2") == [2]
    arguments = dict(image=photo(), mask_image=box(2, 2, 6, 6), class_labels="alias 2", guidance_scale=2.0)
    expected = codes_of(pipes["class"], **arguments, generator=generators(1))
    assert torch.equal(codes_of(inpaint, **arguments, generator=generators(1)), expected)


def test_from_pipe_casts_what_it_shares_and_the_constructor_does_not(bases, tmp_path):
    """diffusers' `from_pipe` casts to float32 unless a dtype is given, the codebook too."""
    bases["class"].save_pretrained(tmp_path)
    half = DraftAndRevisePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inpaint = DraftAndReviseInpaintPipeline(**half.components, id2label=half.config.id2label)
    for dtype, codebook in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32,) * 2):
        assert inpaint.transformer.dtype == half.transformer.dtype == half.vae.dtype == dtype
        assert half.vae.quantizer.codebook.dtype == codebook
        inpaint = DraftAndReviseInpaintPipeline.from_pipe(
            half, **dict(dtype=torch.bfloat16) if codebook == torch.float32 else {}
        )


# Refusals


NAN = np.full((8, 8, 3), np.nan)
POSITIONS = torch.ones(1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(image=None), "`image` must be a PIL image"),
        (dict(image="cat.png"), "`image` must be a PIL image"),
        (dict(image=[]), "`image` must not be empty"),
        (dict(image=np.zeros((8, 8))), r"`image` must hold ndarrays of shape \(height, width, 3\), got \(8, 8\)"),
        (dict(image=np.zeros((3, 8, 8))), r"`image` must hold ndarrays of shape \(height, width, 3\)"),
        (dict(image=torch.zeros(8, 8, 3)), r"`image` must hold Tensors of shape \(3, height, width\)"),
        (dict(image=np.zeros((0, 8, 8, 3))), "`image` must not be empty"),
        (dict(image=np.zeros((8, 0, 3))), "`image` must hold ndarrays of shape"),
        (dict(image=2 * torch.ones(3, 8, 8)), r"`image` must hold numbers in \[0, 1\] or uint8, got \[2.0, 2.0\]"),
        (dict(image=-torch.ones(3, 8, 8)), r"`image` must hold numbers in \[0, 1\]"),
        (dict(image=NAN), r"`image` must hold numbers in \[0, 1\]"),
        (dict(image=np.zeros((8, 8, 3), dtype=int)), r"`image` must hold numbers in \[0, 1\] or uint8, got int64"),
        (dict(image=[photo()] * 3, mask_image=[box(0, 0, 8, 8)] * 2), "`mask_image` must be one or 3"),
        (dict(image=[photo()] * 2, class_labels=[1, 2, 3]), "`image` must be one or 3"),
        (dict(image=[photo()] * 3, class_labels=[1, 2]), "`class_labels` must be one or 3"),
        (dict(mask_image=None), "`mask_image` or `mask` must be given, and not both, got neither"),
        (dict(mask=POSITIONS), "`mask_image` or `mask` must be given, and not both, got both"),
        (dict(mask_image=3), "`mask_image` must be a PIL image"),
        (dict(mask_image=torch.full((8, 8), 255.0)), r"`mask_image` must hold numbers in \[0, 1\] or uint8"),
        (dict(mask_image=torch.ones(3, 3, 8, 8)), r"`mask_image` must hold Tensors of shape \(1, height, width\)"),
        (dict(mask_image=None, mask=POSITIONS.float()), r"`mask` must be a bool torch.Tensor of shape"),
        (dict(mask_image=None, mask=POSITIONS[0]), r"`mask` must be a bool torch.Tensor of shape"),
        (dict(mask_image=None, mask=POSITIONS[:, :2]), r"`mask` must be a bool torch.Tensor of shape"),
        (dict(mask_image=None, mask=POSITIONS.tolist()), r"`mask` must be a bool torch.Tensor of shape"),
        (dict(mask_image=None, mask=POSITIONS.expand(2, 4, 4), image=[photo()] * 3), "`mask` must be one or 3"),
        (dict(composite=None), "`composite` must be True or False, got None"),
        (dict(class_labels=None), "`class_labels` must be given"),
        (dict(class_labels=NUM_CLASSES), "`class_labels` must lie in"),
        (dict(prompt="a cat"), "`prompt` must be None"),
        (dict(num_images_per_prompt=0), "`num_images_per_prompt` must be a positive integer"),
        (dict(num_revisions=-1), "`num_revisions` must be an integer of at least 0"),
        (dict(temperature=0), "`temperature` must be a positive finite number"),
        (dict(guidance_scale=-1), "`guidance_scale` must be a finite number"),
        (dict(selection="best"), "`selection` must be one of"),
        (dict(generator=generators(1, 2)), "`generator` must be one or a list of 1"),
        (dict(latents=torch.zeros(2, 4, 4, 3, dtype=torch.int64)), r"`latents` must have shape \(1, 4, 4, 3\)"),
        (dict(output_type="jpg"), "`output_type` must be"),
        (dict(callback_on_step_end=3), "`callback_on_step_end` must be callable"),
        (dict(callback_on_step_end_tensor_inputs=["mask"]), "`callback_on_step_end_tensor_inputs` must be"),
    ],
)
def test_bad_inputs_are_refused_by_name(pipes, arguments, message):
    good = dict(image=photo(), mask_image=box(0, 0, 8, 4), class_labels=1)
    with pytest.raises(ValueError, match=message):
        pipes["class"](**{**good, **arguments})


def test_an_unconditional_model_is_not_guided(pipes):
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 or None"):
        pipes[None](photo(), box(0, 0, 8, 4), guidance_scale=2.0)
