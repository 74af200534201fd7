"""DraftAndRevisePipeline: the laws of its call."""

import io
import logging

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from components import CODEBOOK_SIZE, CONDITIONS, random_codes, random_pixels, tiny_pipeline, tiny_rq_pipeline
from PIL import Image

from rq_draft_revise import DraftAndReviseInpaintPipeline, DraftAndRevisePipeline, DraftAndReviseScheduler


SELECTIONS = ("random", "top-c", "top-c-50%")
PROMPTS = ["a cat", "the owl at night in the snow on the sea at dusk", "volcano"]  # short, overlong, one word
CLASSES = [3, "class 0", "alias 4"]
NUM_POSITIONS = 16
MASK = CODEBOOK_SIZE


def quiet_pipeline(*args, **kwargs) -> DraftAndRevisePipeline:
    pipe = tiny_pipeline(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes():
    """One pipeline a condition for the whole module: no call changes it, which is a law of its own below."""
    return {condition: quiet_pipeline(condition) for condition in CONDITIONS}


@pytest.fixture(scope="module")
def text_pipe(pipes):
    return pipes["text"]


def conditions_of(condition: str | None, rows: slice = slice(None)) -> dict:
    """The three conditions of this module, or some of them, as arguments of a call that makes one image each."""
    return {"text": dict(prompt=PROMPTS[rows]), "class": dict(class_labels=CLASSES[rows])}.get(
        condition, dict(num_images_per_prompt=len(PROMPTS[rows]))
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(pipe, *args, **kwargs) -> torch.Tensor:
    return pipe(*args, **kwargs, output_type="latent").images


class Forwards:
    """Inside `with`, what each forward of the transformer was asked: `(number of code maps, rows, guidance scale)`.

    Rows are counted at the first block, where it costs; a forward of the condition alone has 0 code maps.
    """

    def __init__(self, pipe):
        self.transformer, self.calls, self.rows = pipe.transformer, [], []

    def _before(self, module, args, kwargs):
        codes = args[0] if args else kwargs.get("codes")
        self.calls.append((0 if codes is None else codes.shape[0], kwargs.get("guidance_scale")))

    def __enter__(self):
        self.hooks = [
            self.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            self.transformer.blocks[0].register_forward_pre_hook(lambda _, args: self.rows.append(args[0].shape[0])),
        ]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


# An image is a function of its condition and its generator


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    "condition, guided", [(None, False), ("class", False), ("class", True), ("text", False), ("text", True)]
)
def test_an_image_is_the_same_alone_or_in_any_batch(pipes, condition, guided, selection):
    pipe = pipes[condition]
    arguments = dict(selection=selection, num_inference_steps=3, num_revisions=1, output_type="pt")
    if guided:
        arguments |= dict(guidance_scale=2.5, draft_guidance_scale=1.5)
    together = pipe(**conditions_of(condition), generator=generators(1, 2, 3), **arguments).images
    assert together.std(dim=0).max() > 0.01  # three images, not one
    for row in range(3):
        alone = pipe(
            **conditions_of(condition, slice(row, row + 1)), generator=generators(row + 1), **arguments
        ).images
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)
    # a string, a label and a generator by itself are lists of one
    first = {
        name: value if name.startswith("num") else value[0]
        for name, value in conditions_of(condition, slice(1)).items()
    }
    alone = pipe(**first, generator=generator(1), **arguments).images
    torch.testing.assert_close(alone[0], together[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_partly_drafted_image_is_the_same_in_any_batch(text_pipe, selection):
    """Ragged masks, one image with nothing to draft: by default its steps shrink to the positions it has."""
    latents = random_codes(text_pipe.transformer, batch_size=3)
    latents[0].flatten(0, 1)[:9] = text_pipe.transformer.mask_token_id
    latents[1].flatten(0, 1)[5::4] = text_pipe.transformer.mask_token_id
    scheduler = DraftAndReviseScheduler(num_inference_steps=7, num_revisions=1, selection=selection)
    pipe = DraftAndRevisePipeline(**text_pipe.components | dict(scheduler=scheduler))
    pipe.set_progress_bar_config(disable=True)
    together = codes_of(pipe, PROMPTS, latents=latents, generator=generators(1, 2, 3))
    for row in range(3):
        alone = codes_of(pipe, PROMPTS[row], latents=latents[row : row + 1], generator=generators(row + 1))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("condition", CONDITIONS)
def test_images_of_a_prompt_follow_each_other(pipes, condition):
    pipe = pipes[condition]
    if condition is None:
        assert codes_of(pipe, num_images_per_prompt=4, generator=generator()).shape[0] == 4
        return
    (name, values), *_ = conditions_of(condition, slice(2)).items()
    several = codes_of(
        pipe, **{name: values}, num_images_per_prompt=2, guidance_scale=2.0, generator=generators(1, 2, 3, 4)
    )
    repeated = codes_of(
        pipe,
        **{name: [value for value in values for _ in range(2)]},
        guidance_scale=2.0,
        generator=generators(1, 2, 3, 4),
    )
    assert torch.equal(several, repeated)
    assert len({tuple(image.flatten().tolist()) for image in several}) == 4


def test_a_negative_prompt_goes_with_its_prompt(text_pipe):
    arguments = dict(guidance_scale=3.0, draft_guidance_scale=3.0)
    negative = ["snow", "a rocket"]
    together = codes_of(text_pipe, PROMPTS[:2], negative_prompt=negative, generator=generators(1, 2), **arguments)
    for row in range(2):
        alone = codes_of(
            text_pipe, PROMPTS[row], negative_prompt=negative[row], generator=generators(row + 1), **arguments
        )
        assert torch.equal(alone[0], together[row])
    one_for_all = codes_of(text_pipe, PROMPTS[:2], negative_prompt="snow", generator=generators(1, 2), **arguments)
    without = codes_of(text_pipe, PROMPTS[:2], generator=generators(1, 2), **arguments)
    assert torch.equal(one_for_all[0], together[0])
    assert not torch.equal(one_for_all[1], together[1]) and not torch.equal(one_for_all[0], without[0])


@pytest.mark.parametrize("blank", ["", " \n", ["", "\t"]])
def test_an_empty_negative_prompt_is_none(text_pipe, blank):
    arguments = dict(generator=generators(1, 2), guidance_scale=3.0, draft_guidance_scale=3.0)
    none = codes_of(text_pipe, PROMPTS[:2], **arguments)
    arguments["generator"] = generators(1, 2)
    assert torch.equal(codes_of(text_pipe, PROMPTS[:2], negative_prompt=blank, **arguments), none)


def test_negative_prompts_are_empty_row_by_row(text_pipe):
    arguments = dict(guidance_scale=3.0, draft_guidance_scale=3.0)
    negative = ["", "snow", " "]
    together = codes_of(text_pipe, PROMPTS, negative_prompt=negative, generator=generators(1, 2, 3), **arguments)
    for row, own in enumerate((None, "snow", None)):
        alone = codes_of(text_pipe, PROMPTS[row], negative_prompt=own, generator=generators(row + 1), **arguments)
        assert torch.equal(alone[0], together[row])


def test_an_overlong_prompt_is_read_as_far_as_the_model_reads_and_said(text_pipe, caplog):
    words = PROMPTS[1].split()
    kept = " ".join(words[:6])
    logger = logging.getLogger("rq_draft_revise.conditions")
    logger.addHandler(caplog.handler)
    try:
        overlong = codes_of(text_pipe, PROMPTS[1], generator=generator())
        assert f"`prompt` has {len(words)} tokens, of which the model reads the first 6" in caplog.text
        caplog.clear()
        assert torch.equal(overlong, codes_of(text_pipe, kept, generator=generator()))
        assert caplog.text == ""
    finally:
        logger.removeHandler(caplog.handler)


# Outputs


def test_output_types_agree(text_pipe):
    def call(output_type, **kwargs):
        return text_pipe(PROMPTS[:2], generator=generators(1, 2), output_type=output_type, **kwargs)

    codes = call("latent").images
    pt, array, pil = (call(output_type).images for output_type in ("pt", "np", "pil"))
    assert codes.shape == (2, 4, 4, 3) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < text_pipe.transformer.mask_token_id
    assert pt.shape == (2, 3, 8, 8) and pt.min() >= 0 and pt.max() <= 1 and pt.std() > 0.01
    assert torch.equal(text_pipe.decode_latents(codes, output_type="pt"), pt)
    sample = text_pipe.vae.decode(codes).sample
    torch.testing.assert_close(pt, (sample / 2 + 0.5).clamp(0, 1))
    assert isinstance(array, np.ndarray) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in pil] == [(8, 8)] * 2
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype("uint8"))
    assert not pt.requires_grad
    (only,) = call("pt", return_dict=False)
    assert torch.equal(only, pt)


def test_undrafted_positions_decode_as_the_zero_vector(text_pipe):
    masked = text_pipe.prepare_latents(1)
    assert (masked == text_pipe.transformer.mask_token_id).all()
    nothing = torch.zeros(1, text_pipe.vae.config.latent_channels, 4, 4)
    sample = text_pipe.vae.decoder(text_pipe.vae.post_quant_conv(nothing))
    expected = (sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(text_pipe.decode_latents(masked, output_type="pt"), expected)


# Where it starts from


def test_latents_without_a_mask_are_only_revised(text_pipe):
    latents = random_codes(text_pipe.transformer, batch_size=1)
    before = latents.clone()
    with Forwards(text_pipe) as forwards:
        revised = codes_of(
            text_pipe, "a cat", latents=latents, num_revise_steps=2, num_revisions=3, generator=generator()
        )
    assert text_pipe.num_timesteps == 6 and [codes for codes, _ in forwards.calls] == [0] + [1] * 6
    assert not torch.equal(revised, latents) and torch.equal(latents, before)
    same = codes_of(text_pipe, "a cat", latents=latents, num_revisions=0, generator=generator())
    assert torch.equal(same, latents) and text_pipe.num_timesteps == 0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_masked_stacks_of_latents_are_drafted(text_pipe, selection):
    mask = text_pipe.transformer.mask_token_id
    latents = random_codes(text_pipe.transformer, batch_size=2)
    latents[0, 1:3, 1:3] = mask
    latents[1, 0] = mask
    known = latents != mask
    drafted = codes_of(
        text_pipe, PROMPTS[:2], latents=latents, selection=selection, num_revisions=0, generator=generators(1, 2)
    )
    assert torch.equal(drafted[known], latents[known]) and (drafted != mask).all()
    revised = codes_of(text_pipe, PROMPTS[:2], latents=latents, selection=selection, generator=generators(1, 2))
    assert not torch.equal(revised[known], latents[known])


# Revising a given image


def photo(seed: int = 0, size: int = 8) -> Image.Image:
    pixels = random_pixels(1, size, seed)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(((pixels + 1) * 127.5).round().astype("uint8"))


def encode(pipe, *images: Image.Image) -> torch.Tensor:
    pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / np.float32(255)
    with torch.no_grad():
        return pipe.vae.encode(2 * torch.from_numpy(pixels) - 1).codes


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_revising_an_image_is_revising_its_codes(pipes, condition, selection):
    pipe, images = pipes[condition], [photo(1), photo(2), photo(3)]
    conditions = conditions_of(condition) if condition else {}
    arguments = conditions | dict(selection=selection, num_revise_steps=3, num_revisions=2)
    codes = encode(pipe, *images)
    expected = codes_of(pipe, latents=codes, generator=generators(1, 2, 3), **arguments)
    with Forwards(pipe) as forwards:
        revised = codes_of(pipe, image=images, generator=generators(1, 2, 3), **arguments)
    assert torch.equal(revised, expected) and not torch.equal(revised, codes)
    # no step of a draft: the condition once, then the steps of the revisions
    assert [rows for rows, _ in forwards.calls] == [0] * (condition is not None) + [3] * 6
    zero = codes_of(pipe, image=images, num_inference_steps=0, generator=generators(1, 2, 3), **arguments)
    assert torch.equal(zero, expected)


def test_images_need_not_be_square():
    pipe = quiet_pipeline("text", height=2, width=3)
    image = photo().resize((6, 4))  # PIL has the width first
    assert pipe("a cat").images[0].size == (6, 4)
    assert pipe("a cat", output_type="np").images.shape == (1, 4, 6, 3)
    codes = encode(pipe, image)
    assert codes.shape[1:3] == (2, 3)
    larger = np.asarray(image).repeat(2, axis=0).repeat(2, axis=1)
    for same in (image, np.asarray(image), [image]):
        assert torch.equal(codes_of(pipe, "a cat", image=same, num_revisions=0), codes)
    assert codes_of(pipe, "a cat", image=larger).shape == codes.shape
    together = codes_of(pipe, ["a cat", "snow"], generator=generators(1, 2))
    assert torch.equal(together[1:], codes_of(pipe, "snow", generator=generators(2)))
    # a draft of one position leaves the others, wherever it lies
    for row, column in ((0, 2), (1, 0)):
        start = codes.clone()
        start[:, row, column] = MASK
        drafted = codes_of(pipe, "a cat", latents=start, num_revisions=0, generator=generator(row))
        assert torch.equal(drafted[start != MASK], codes[start != MASK]) and (drafted != MASK).all()


def test_the_number_of_revisions_is_how_far_an_image_is_left_behind(text_pipe):
    def revised(num_revisions, **arguments):
        return codes_of(
            text_pipe, "a cat", image=photo(), num_revisions=num_revisions, generator=generator(), **arguments
        )

    codes = encode(text_pipe, photo())
    assert torch.equal(revised(0), codes)
    reconstruction = text_pipe("a cat", image=photo(), num_revisions=0, output_type="pt").images
    assert torch.equal(reconstruction, text_pipe.decode_latents(codes, output_type="pt"))
    # a revision goes on from the one before it
    seen = []
    revised(3, num_revise_steps=2, callback_on_step_end=lambda pipe, step, _, kwargs: seen.append(kwargs["latents"]))
    assert all(torch.equal(revised(n, num_revise_steps=2), seen[2 * n - 1]) for n in (1, 2, 3))
    # in a single step everything is masked at once, and nothing of the image is left to go by
    other = codes_of(text_pipe, "a cat", image=photo(9), num_revisions=1, num_revise_steps=1, generator=generator())
    assert torch.equal(revised(1, num_revise_steps=1), other)


def test_one_image_serves_all_prompts_and_one_prompt_all_images(text_pipe):
    images, prompts = [photo(1), photo(2)], ["a cat", "snow"]
    for arguments in ((images, prompts[0]), (images[0], prompts), (images, prompts)):
        image, prompt = (one if isinstance(one, list) else [one] * 2 for one in arguments)
        expected = codes_of(text_pipe, prompt, image=image, generator=generators(1, 2), guidance_scale=2.0)
        codes = codes_of(text_pipe, arguments[1], image=arguments[0], generator=generators(1, 2), guidance_scale=2.0)
        assert torch.equal(codes, expected)
        for row in range(2):
            alone = dict(image=image[row], generator=generators(row + 1), guidance_scale=2.0)
            assert torch.equal(codes_of(text_pipe, prompt[row], **alone)[0], expected[row])
        several = codes_of(
            text_pipe,
            arguments[1],
            image=arguments[0],
            num_images_per_prompt=2,
            generator=generators(1, 3, 2, 4),
            guidance_scale=2.0,
        )
        assert torch.equal(several[::2], expected) and not torch.equal(several[1::2], expected)


def test_an_image_may_be_of_any_kind_and_size(text_pipe):
    image = photo()
    array, channels = np.asarray(image), np.asarray(image).transpose(2, 0, 1).copy()
    expected = encode(text_pipe, image)
    for same in (
        image,
        [image],
        image.convert("RGBA"),
        array,
        array / 255,
        array[None],
        [array],
        torch.tensor(channels),
        torch.tensor(channels)[None] / 255,
        [torch.tensor(channels) / 255],
    ):
        assert torch.equal(codes_of(text_pipe, "a cat", image=same, num_revisions=0), expected)
    large = photo(size=40)
    small = large.resize((8, 8), Image.Resampling.LANCZOS)
    codes = codes_of(text_pipe, "a cat", image=[large, small], num_revisions=0)
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[:1], encode(text_pipe, small))


@pytest.mark.parametrize("height, width", [(40, 40), (64, 23), (9, 8), (8, 5), (5, 6)])
def test_a_picture_of_any_size_has_the_same_pixels_of_any_kind(text_pipe, height, width):
    """Lanczos of PIL images and bicubic of arrays and tensors are within 0.02; the nearest pixel is over 0.05 away."""
    smooth = np.asarray(photo(3, 2).resize((width, height), Image.Resampling.BICUBIC))
    # and where five pixels become one, a grain that only antialiasing takes away
    grain = np.random.default_rng(0).uniform(-40, 40, smooth.shape) * (min(height, width) > 20)
    image = Image.fromarray((smooth + grain).clip(0, 255).astype("uint8"))
    array, expected = np.array(image), text_pipe.prepare_image(image)
    channels = torch.tensor(array).permute(2, 0, 1)
    pixels = text_pipe.prepare_image(array)
    torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)
    for same in (array / 255, (array / 255).astype("float32"), channels, channels / 255, channels.double() / 255):
        torch.testing.assert_close(text_pipe.prepare_image(same), pixels, atol=1e-6, rtol=0)  # float32's rounding
    nearest = torch.nn.functional.interpolate(channels[None] / 255, size=(8, 8))
    assert (nearest - expected).abs().max() > 0.05


def test_resized_pixels_stay_in_their_range(text_pipe):
    edges = np.zeros((40, 40, 3), dtype=np.uint8)
    edges[10:30, 10:30] = 255  # next to an edge a bicubic kernel overshoots
    for image in (Image.fromarray(edges), edges, torch.tensor(edges).permute(2, 0, 1) / 255):
        pixels = text_pipe.prepare_image(image)
        assert pixels.min() == 0 and pixels.max() == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(latents=torch.zeros(1, 4, 4, 3, dtype=torch.int64)), "`image` or `latents` may be given .* got both"),
        (
            dict(num_inference_steps=4),
            r"`num_inference_steps` must lie in \[0, 0\], as an `image` is only revised, got 4",
        ),
        (dict(image="cat.png"), "`image` must be a PIL image"),
        (dict(image=[]), "`image` must not be empty"),
        (dict(image=np.zeros((8, 8))), r"`image` must hold ndarrays of shape \(height, width, 3\), got \(8, 8\)"),
        (dict(image=2 * torch.ones(3, 8, 8)), r"`image` must hold numbers in \[0, 1\] or uint8, got \[2.0, 2.0\]"),
        (dict(image=[photo()] * 3), "`prompt` must be one or 3, one for each of the others, got 2"),
        (dict(num_revise_steps=17), r"`num_revise_steps` must lie in \[1, 16\]"),
        (dict(generator=generators(1)), "`generator` must be one or a list of 2"),
    ],
)
def test_a_bad_image_is_refused_by_name(text_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        text_pipe(**{**dict(prompt=["a cat", "snow"], image=photo()), **arguments})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_image_is_revised_in_half_precision(dtype):
    pipe = quiet_pipeline("text").to(dtype)
    revised = pipe("a cat", image=[photo(1), photo(2)], guidance_scale=2.0, output_type="pt").images
    assert revised.isfinite().all() and revised.std() > 0.01


@pytest.mark.parametrize("kind", ["model", "sequential", "leaf_level"])
def test_an_image_is_encoded_by_an_offloaded_model_too(kind):
    """The CPU in the part of the accelerator: hooks see every access to a weight, or the call fails."""
    pipe = quiet_pipeline("text")
    arguments = dict(prompt="a cat", image=[photo(1), photo(2)], guidance_scale=2.0, output_type="pt")
    expected = pipe(**arguments, generator=generators(1, 2)).images
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        for model in (pipe.transformer, pipe.vae):
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        assert pipe.vae.encoder.conv_in.weight.is_meta
    else:
        pipe.enable_group_offload(torch.device("cpu"), offload_type=kind)
    offloaded = pipe(**arguments, generator=generators(1, 2)).images
    torch.testing.assert_close(offloaded, expected, atol=1e-6, rtol=0)


# The phases


@pytest.mark.parametrize("with_image", [False, True])
def test_a_draft_samples_every_position_once_and_a_revise_step_changes_its_block_alone(text_pipe, with_image):
    """As the transformer is asked and as the codes change, whatever the scheduler says of itself."""
    asked, seen = [], []
    hook = text_pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(args[1]) if len(args) > 1 else None, with_kwargs=True
    )
    draft_steps = 0 if with_image else 5
    try:
        codes_of(
            text_pipe,
            PROMPTS,
            image=[photo(1), photo(2), photo(3)] if with_image else None,
            num_inference_steps=draft_steps,
            num_revise_steps=3,
            num_revisions=2,
            generator=generators(1, 2, 3),
            callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(kwargs["latents"]),
        )
    finally:
        hook.remove()
    first = encode(text_pipe, photo(1), photo(2), photo(3)) if with_image else text_pipe.prepare_latents(3)
    assert len(asked) == len(seen) == draft_steps + 6
    for positions, before, after in zip(asked, [first, *seen], seen):
        changed = (before != after).any(dim=-1).flatten(1)
        assert changed.any() and not changed.scatter(1, positions, False).any()
    phases = [asked[draft_steps : draft_steps + 3], asked[draft_steps + 3 :]]
    for phase in phases if with_image else [asked[:draft_steps], *phases]:
        for row in torch.cat(phase, dim=1).tolist():
            assert sorted(row) == list(range(NUM_POSITIONS))
    # a partition of its own for every image and revision
    blocks = {tuple(sorted(row)) for positions in (phases[0][0], phases[1][0]) for row in positions.tolist()}
    assert len(blocks) == 6


# Guidance


def test_a_guidance_scale_of_1_costs_nothing(pipes):
    for condition in CONDITIONS:
        with Forwards(pipes[condition]) as forwards:
            codes_of(pipes[condition], **conditions_of(condition), guidance_scale=1, draft_guidance_scale=1.0)
        steps = pipes[condition].num_timesteps
        # the condition once, then one forward a step; three rows each, and none of a null condition
        prefix = [] if condition is None else [(0, None)]
        assert forwards.calls == prefix + [(3, None)] * steps
        assert forwards.rows == [3] * len(forwards.calls)


def test_only_the_guided_phase_pays_for_guidance(text_pipe):
    with Forwards(text_pipe) as forwards:
        codes_of(text_pipe, PROMPTS, num_inference_steps=3, num_revise_steps=2, num_revisions=1, guidance_scale=2.0)
    assert [scale for _, scale in forwards.calls] == [None] * 4 + [2.0] * 2
    assert forwards.rows == [6] + [3] * 3 + [6] * 2
    with Forwards(text_pipe) as forwards:
        codes_of(
            text_pipe, PROMPTS, num_inference_steps=3, num_revise_steps=2, num_revisions=1, draft_guidance_scale=0
        )
    assert [scale for _, scale in forwards.calls] == [None] + [0.0] * 3 + [None] * 2


def test_guidance_is_read_anew_at_every_step(text_pipe):
    arguments = dict(prompt=PROMPTS, num_inference_steps=3, num_revise_steps=2, num_revisions=2)

    def guided(**changes):
        """The codes where guidance changes after some steps, and the rows that the forwards had."""

        def change(pipe, step, timestep, callback_kwargs):
            pipe._guidance_scale = changes.get(f"after_{step}", pipe._guidance_scale)
            return {}

        with Forwards(text_pipe) as forwards:
            codes = codes_of(
                text_pipe,
                **arguments,
                guidance_scale=changes["at_first"],
                generator=generators(1, 2, 3),
                callback_on_step_end=change,
            )
        return codes, forwards.rows

    always, _ = guided(at_first=3.0)
    never, _ = guided(at_first=1.0)
    late, rows = guided(at_first=1.0, after_2=3.0)  # on, at the end of the draft: the null conditions come with it
    assert torch.equal(late, always) and not torch.equal(late, never)
    assert rows == [3] + [3] * 3 + [6] + [6] * 4
    early, rows = guided(at_first=3.0, after_2=1.0)  # off
    assert torch.equal(early, never) and rows == [6] + [3] * 3 + [3] * 4
    assert text_pipe.guidance_scale == 1.0


# Callbacks


def test_a_callback_sees_the_codes_of_every_step(text_pipe):
    mask, seen = text_pipe.transformer.mask_token_id, []

    def look(pipe, step, timestep, callback_kwargs):
        assert pipe is text_pipe and list(callback_kwargs) == ["latents"]
        assert pipe.num_timesteps == 5 and pipe.guidance_scale == 2.0 and pipe.draft_guidance_scale == 1.0
        seen.append((step, int(timestep), callback_kwargs["latents"]))

    codes = codes_of(
        text_pipe,
        "a cat",
        num_inference_steps=3,
        num_revise_steps=1,
        num_revisions=2,
        guidance_scale=2.0,
        generator=generator(),
        callback_on_step_end=look,
    )
    assert [(step, timestep) for step, timestep, _ in seen] == [(i, i) for i in range(5)]
    masked = [int((latents[..., 0] == mask).sum()) for *_, latents in seen]
    assert masked == [11, 6, 0, 0, 0]
    assert torch.equal(seen[-1][2], codes)

    seen.clear()
    nothing = codes_of(
        text_pipe,
        "a cat",
        num_inference_steps=1,
        num_revisions=0,
        generator=generator(),
        callback_on_step_end=lambda pipe, step, timestep, callback_kwargs: seen.append(callback_kwargs),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] and nothing.shape == codes.shape


def test_a_callback_may_replace_the_codes(text_pipe):
    start = random_codes(text_pipe.transformer, batch_size=1)

    revise = dict(num_revise_steps=2, num_revisions=1)

    def replace(at):
        def callback(pipe, step, timestep, callback_kwargs):
            return {"latents": start} if step == at else None

        arguments = dict(num_inference_steps=3, **revise, generator=generator())
        return codes_of(text_pipe, "a cat", **arguments, callback_on_step_end=callback)

    assert torch.equal(replace(at=4), start)  # the last word
    # after the draft: the revision is that of the new codes
    revised = codes_of(text_pipe, "a cat", latents=start, **revise, generator=generator())
    assert torch.equal(replace(at=2), revised) and not torch.equal(replace(at=99), revised)


def mask_again(codes):
    batch, row, column = (codes != MASK).all(dim=-1).nonzero()[0]
    codes[batch, row, column] = MASK


def fill_ahead(codes):
    codes[(codes == MASK).all(dim=-1)] = 0


def mask_in_part(codes):
    codes[..., 1] = MASK


def leave_the_codebook(codes):
    codes[:, 1, 1, 2] = MASK + 1


HOLES = (
    (1, mask_again, r"are masked where those it was given are, got 1 position\(s\) masked that were not, and 0 not"),
    (1, fill_ahead, r"are masked where those it was given are, got 0 position\(s\) masked that were not, and 8 not"),
    (4, mask_again, r"are masked where those it was given are, got 1 position\(s\) masked that were not, and 0 not"),
)


@pytest.mark.parametrize(
    "selection, at, change, message",
    [
        *((selection, *hole) for selection in SELECTIONS for hole in HOLES),
        ("random", 1, mask_in_part, "are a code map: `latents` must be masked in whole stacks"),
        ("random", 1, leave_the_codebook, r"are a code map: `latents` must lie in \[0, 50\]"),
        ("random", 1, torch.Tensor.int, "are a code map: `latents` must have dtype torch.int64, got torch.int32"),
        ("random", 1, torch.Tensor.tolist, "are a code map: `latents` must be a torch.Tensor of int64, got list"),
        ("random", 1, lambda codes: codes[:, :2], r"have shape \(1, 4, 4, 3\) on cpu, got \(1, 2, 4, 3\) on cpu"),
        ("random", 1, lambda codes: codes.to("meta"), r"have shape \(1, 4, 4, 3\) on cpu, got .* on meta"),
    ],
)
def test_a_callback_may_not_leave_holes(text_pipe, selection, at, change, message):
    """A step samples its own block alone: a position that is masked again would stay so."""

    def callback(pipe, step, timestep, callback_kwargs):
        codes = callback_kwargs["latents"].clone()
        changed = change(codes) if step == at else None
        return {"latents": codes if changed is None else changed}

    with pytest.raises(ValueError, match=f"`callback_on_step_end` must return `latents` that {message}"):
        text_pipe(
            "a cat", num_inference_steps=4, num_revise_steps=2, selection=selection, callback_on_step_end=callback
        )


def test_codes_given_back_by_a_callback_are_those_it_was_given(text_pipe):
    expected = codes_of(text_pipe, "a cat", generator=generator())
    for callback in (
        lambda pipe, step, timestep, callback_kwargs: callback_kwargs,
        lambda pipe, step, timestep, callback_kwargs: {"latents": callback_kwargs["latents"].clone()},
        lambda pipe, step, timestep, callback_kwargs: None,
    ):
        assert torch.equal(
            codes_of(text_pipe, "a cat", generator=generator(), callback_on_step_end=callback), expected
        )


def test_interrupt_leaves_out_the_remaining_steps(text_pipe):
    seen = []

    def stop(pipe, step, timestep, callback_kwargs):
        seen.append(callback_kwargs["latents"])
        pipe._interrupt = step == 1

    codes = codes_of(text_pipe, "a cat", generator=generator(), callback_on_step_end=stop)
    assert len(seen) == 2 and torch.equal(codes, seen[-1])
    assert codes_of(text_pipe, "a cat", generator=generator()).max() < text_pipe.transformer.mask_token_id
    assert not text_pipe.interrupt


def test_progress_counts_draft_and_revise_steps(text_pipe, monkeypatch):
    bars = []
    progress_bar = text_pipe.progress_bar

    def record(*args, **kwargs):
        bars.append(progress_bar(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(text_pipe, "progress_bar", record)
    monkeypatch.setattr(text_pipe, "_progress_bar_config", dict(disable=False, file=io.StringIO()))
    codes_of(text_pipe, "a cat", num_inference_steps=3, num_revise_steps=2, num_revisions=2)
    assert [(bar.total, bar.n) for bar in bars] == [(7, 7)]


# Defaults


def test_none_takes_the_schedulers_default_and_an_argument_overrides_it(text_pipe):
    ours = dict(
        num_inference_steps=5,
        num_revise_steps=3,
        num_revisions=2,
        guidance_scale=1.7,
        temperature=1.3,
        draft_guidance_scale=1.2,
        draft_temperature=0.6,
        selection="top-c-50%",
        top_k=7,
        top_p=0.9,
    )
    others = dict(
        num_inference_steps=4,
        num_revise_steps=2,
        num_revisions=1,
        guidance_scale=3.0,
        temperature=0.4,
        draft_guidance_scale=0.0,
        draft_temperature=2.0,
        selection="random",
        top_k=2,
        top_p=0.3,
    )

    def codes(defaults, **arguments):
        pipe = DraftAndRevisePipeline(**text_pipe.components | dict(scheduler=DraftAndReviseScheduler(**defaults)))
        pipe.set_progress_bar_config(disable=True)
        return codes_of(pipe, PROMPTS, generator=generators(1, 2, 3), **arguments)

    by_default = codes(ours)
    assert torch.equal(by_default, codes(others, **ours))
    for name in ours:  # each one is read: another value gives other codes
        assert not torch.equal(by_default, codes(ours | {name: others[name]})), name


def test_defaults_shrink_to_the_positions_and_arguments_do_not(text_pipe):
    scheduler = DraftAndReviseScheduler(num_inference_steps=64, num_revise_steps=20, num_revisions=1)
    pipe = DraftAndRevisePipeline(**text_pipe.components | dict(scheduler=scheduler))
    pipe.set_progress_bar_config(disable=True)
    codes_of(pipe, "a cat")
    assert pipe.num_timesteps == 2 * NUM_POSITIONS
    latents = random_codes(pipe.transformer, batch_size=1)
    latents[0, 0, :3] = pipe.transformer.mask_token_id
    codes_of(pipe, "a cat", latents=latents, num_revisions=0)
    assert pipe.num_timesteps == 3
    for bad, allowed in (
        (dict(num_inference_steps=17), "[1, 16]"),
        (dict(num_revise_steps=17), "[1, 16]"),
        (dict(num_inference_steps=4, latents=latents), "[1, 3]"),
        (dict(num_inference_steps=1, latents=random_codes(pipe.transformer, batch_size=1)), "[0, 0]"),
    ):
        with pytest.raises(ValueError) as error:
            pipe("a cat", **bad)
        assert f"`{next(iter(bad))}` must lie in {allowed}" in str(error.value)


# Class labels


def test_class_labels_by_id_name_synonym_and_tensor(pipes):
    pipe = pipes["class"]
    expected = codes_of(pipe, class_labels=[3, 0], generator=generators(1, 2))
    for same in (
        ["class 3, alias 3", "class 0"],
        ["Alias 3", " alias 0 "],
        ("class 3", 0),
        torch.tensor([3, 0]),
        torch.tensor([3, 0], dtype=torch.uint8),
        [np.int64(3), np.int32(0)],
        pipe.get_label_ids(["alias 3", "class 0"]),
    ):
        assert torch.equal(codes_of(pipe, class_labels=same, generator=generators(1, 2)), expected)
    for single in (3, "alias 3", torch.tensor(3), torch.tensor([3])):
        assert torch.equal(codes_of(pipe, class_labels=single, generator=generators(1)), expected[:1])
    assert not torch.equal(codes_of(pipe, class_labels=[0, 3], generator=generators(1, 2)), expected)
    assert pipe.get_label_ids("class 4") == [4] and pipe.get_label_ids(["alias 1", "class 2, alias 2"]) == [1, 2]
    for bad in ("class", ["class 1", "nothing"], 3, [3], None, "class 1, class 2"):
        with pytest.raises(ValueError, match="`label`"):
            pipe.get_label_ids(bad)
    with pytest.raises(ValueError, match="`label` by name needs a pipeline with `id2label`"):
        pipes["text"].get_label_ids("class 1")


# Components


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def snapshot(pipe) -> dict:
    """What a call must leave as it is: the models' tensors, bit for bit and by identity, and all configurations."""
    state = {}
    for name, component in pipe.components.items():
        state[name] = dict(component.config) if hasattr(component, "config") else component
        if isinstance(component, torch.nn.Module):
            for key, tensor in (*component.named_parameters(), *component.named_buffers()):
                state[f"{name}.{key}"] = (id(tensor), tensor.dtype, tensor.requires_grad, bits(tensor))
            state[f"{name}.training"] = [module.training for module in component.modules()]
    return state | {"pipeline": dict(pipe.config)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_call_changes_no_component(dtype, tmp_path):
    pipe = quiet_pipeline("text")
    pipe.save_pretrained(tmp_path)
    # loaded in half precision, the RQ-VAE keeps its codebook in float32: a cast of the whole and back would round it
    pipe = DraftAndRevisePipeline.from_pretrained(tmp_path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    before = snapshot(pipe)
    image = pipe(
        "a cat", guidance_scale=2.0, num_inference_steps=2, selection="top-c", generator=generator(), output_type="pt"
    )
    assert snapshot(pipe) == before
    assert image.images.isfinite().all()

    def fail(*args, **kwargs):
        raise RuntimeError("no picture today")

    pipe.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no picture today"):
        pipe("a cat", num_inference_steps=2)
    assert snapshot(pipe) == before


def test_a_float16_decoder_that_overflows_is_run_in_float32(text_pipe):
    def outputs(force_upcast):
        pipe = quiet_pipeline("text")
        # activations pass 65504 in the decoder and come back under it: in float16 they are lost
        pipe.vae.post_quant_conv.weight.data *= 30
        pipe.vae.decoder.conv_in.weight.data *= 2e5
        pipe.vae.register_to_config(force_upcast=force_upcast)
        pipe.vae.half()
        return pipe.decode_latents(random_codes(pipe.transformer), output_type="pt"), pipe.vae.dtype

    image, dtype = outputs(force_upcast=True)
    assert image.isfinite().all() and dtype == torch.float16
    image, _ = outputs(force_upcast=False)
    assert not image.isfinite().all()


def test_components_may_be_shared(text_pipe):
    other = DraftAndRevisePipeline(**text_pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = codes_of(text_pipe, "a cat", generator=generator())
    assert not torch.equal(
        codes_of(other, "owl", selection="top-c", num_inference_steps=7, guidance_scale=3.0), expected
    )
    assert torch.equal(codes_of(text_pipe, "a cat", generator=generator()), expected)
    assert torch.equal(codes_of(other, "a cat", generator=generator()), expected)


def test_numbers_of_numpy_are_numbers(pipes):
    plain = codes_of(
        pipes["class"], class_labels=1, num_inference_steps=3, temperature=0.5, top_k=4, generator=generator()
    )
    numpy = codes_of(
        pipes["class"],
        class_labels=np.int64(1),
        num_inference_steps=np.int64(3),
        temperature=np.float32(0.5),
        top_k=np.int32(4),
        generator=generator(),
    )
    assert torch.equal(plain, numpy)


@pytest.mark.parametrize("kind", ["draft and revise", "inpaint", "autoregressive"])
def test_predictions_that_are_no_numbers_are_not_shown(kind):
    pipe = tiny_rq_pipeline("class") if kind == "autoregressive" else quiet_pipeline("class")
    arguments = dict(class_labels=1)
    if kind == "inpaint":
        pipe = DraftAndReviseInpaintPipeline(**pipe.components)
        arguments |= dict(image=random_pixels() / 2 + 0.5, mask_image=torch.ones(1, 1, 8, 8))
    pipe.transformer.blocks[0].ff.net[2].bias.data[3] = torch.inf
    with pytest.raises(RuntimeError, match="not finite, in torch.float32"):
        pipe(**arguments)


def test_what_is_drawn_does_not_depend_on_torchs_default_dtype(text_pipe):
    arguments = dict(prompt=PROMPTS, generator=generators(0, 1, 2))
    expected = codes_of(text_pipe, **arguments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        codes = codes_of(text_pipe, **arguments | dict(generator=generators(0, 1, 2)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(codes, expected)
