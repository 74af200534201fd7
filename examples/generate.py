"""Draws images for prompts and shows on one contact sheet how each of them came about.

    python examples/generate.py "a volcano at dusk" "a cat in the snow" --num-images 4 --seed 0 --output sheet.png

A row of the sheet is an image; its columns are the draft half filled, the draft, and each revision. Image i of the
run (counted over all prompts) is drawn by a generator seeded with `--seed` + i: any can be made again alone.
"""

import sys
import time

import torch
from contact_sheet import draw_sheet, make_parser, open_pipeline, parse, positive_int, refusals_in_one_line, save_sheet


BATCH_SIZE = 16  # images sampled at a time, so that memory does not grow with the length of the run


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n\n")[0], output="outputs/generate.png")
    parser.add_argument("--num-images", type=positive_int, default=4, help="images of each prompt")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")

    sampling = parser.add_argument_group("sampling, by default as saved with the pipeline")
    sampling.add_argument("--num-inference-steps", type=int, help="steps of the draft")
    sampling.add_argument("--num-revise-steps", type=int, help="steps of one revision")
    sampling.add_argument("--num-revisions", type=int, help="revisions; 0 keeps the draft")
    sampling.add_argument("--guidance-scale", type=float, help="guidance of the revisions; 1 is none")
    sampling.add_argument("--temperature", type=float, help="temperature of the revisions")
    sampling.add_argument("--selection", help="which positions a draft step keeps: random, top-c or top-c-50%%")
    return parse(parser, argv)


def stage_captions(num_inference_steps: int, num_revise_steps: int, num_revisions: int) -> dict[int, str]:
    """Returns the steps after which a column of the sheet is taken, in order, each with its caption."""
    captions = {}
    half = num_inference_steps // 2
    if half > 0:
        captions[half - 1] = f"{half} of {num_inference_steps} draft steps"
    captions[num_inference_steps - 1] = "draft"
    for revision in range(1, num_revisions + 1):
        captions[num_inference_steps + revision * num_revise_steps - 1] = f"revision {revision}"
    return captions


def draw_batch(pipe, prompts: list[str], seeds: list[int], **sampling):
    """Samples one image a prompt and keeps how each came about.

    Returns:
        captions (`list[str]`): The stages, see [`stage_captions`].
        rows (`list[list[Image.Image]]`): For each image one picture a stage, the last of them the image itself.
        seconds (`float`): What sampling took, without decoding the stages before the last.
    """
    stages = {}

    def collect(pipe, step_index, timestep, callback_kwargs):
        scheduler = pipe.scheduler  # knows the steps of this call, by flag or by default
        captions = stage_captions(scheduler.num_inference_steps, scheduler.num_revise_steps, scheduler.num_revisions)
        if step_index in captions:
            stages[captions[step_index]] = callback_kwargs["latents"].clone()  # (B, h, w, D)
        return callback_kwargs

    started = time.perf_counter()
    images = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        callback_on_step_end=collect,
        **sampling,
    ).images
    seconds = time.perf_counter() - started

    before = [pipe.decode_latents(codes, output_type="pil") for codes in list(stages.values())[:-1]]
    return list(stages), [list(row) for row in zip(*before, images, strict=True)], seconds


def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = open_pipeline(args, getattr(torch, args.dtype))

    names = ("num_inference_steps", "num_revise_steps", "num_revisions", "guidance_scale", "temperature", "selection")
    sampling = {name: getattr(args, name) for name in names}  # None takes the pipeline's default
    prompts = [prompt for prompt in args.prompts for _ in range(args.num_images)]
    seeds = [args.seed + i for i in range(len(prompts))]
    rows, seconds = [], 0.0
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        with refusals_in_one_line():
            captions, batch_rows, batch_seconds = draw_batch(pipe, prompts[batch], seeds[batch], **sampling)
        rows += batch_rows
        seconds += batch_seconds

    sections = [
        (prompt, rows[i * args.num_images : (i + 1) * args.num_images]) for i, prompt in enumerate(args.prompts)
    ]
    save_sheet(draw_sheet(sections, captions, [f"seed {seed}" for seed in seeds]), args.output)
    print(
        f"{args.output}: {len(rows)} image{'s' * (len(rows) != 1)} in {seconds:.1f} s, "
        f"{seconds / len(rows):.2f} s each ({pipe.device}, {args.dtype})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
