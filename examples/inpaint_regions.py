"""Fills the bottom, the centre and the outside of images (Figure 5 of the paper's supplement).

    python examples/inpaint_regions.py "a cat in the snow" --fill-prompts "a fox in the snow" --output sheet.png

A row of the sheet is an image: as it was, then each region covered and filled. The image is drawn from its prompt, or
is a file of yours. By default it is filled by its own prompt; another one edits it. What is not covered comes back
byte for byte.
"""

import sys

import torch
from contact_sheet import (
    add_images,
    cover,
    draw_sheet,
    make_parser,
    open_images,
    open_pipeline,
    parse,
    refusals_in_one_line,
    save_sheet,
)
from PIL import Image, ImageOps

from rq_draft_revise import DraftAndReviseInpaintPipeline


PROMPTS = ("a snowman in the snow", "a pumpkin at night", "a cat on the grass", "a whale by the sea")


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n\n")[0], output="outputs/inpaint-regions.png", prompts=PROMPTS)
    parser.add_argument("--fill-prompts", nargs="+", help="what to fill with, one a prompt; by default the prompts")
    add_images(parser)
    args = parse(parser, argv)
    args.fill_prompts = args.fill_prompts or args.prompts
    if len(args.fill_prompts) != len(args.prompts):
        parser.error(f"--fill-prompts must be {len(args.prompts)}, one a prompt, got {len(args.fill_prompts)}")
    return args


def draw_regions(size: tuple[int, int]) -> dict[str, Image.Image]:
    """Masks of an image of this width and height, white where it is to be filled."""
    width, height = size
    bottom, centre = Image.new("L", size), Image.new("L", size)
    bottom.paste(255, (0, height // 2, width, height))
    centre.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return {"bottom": bottom, "centre": centre, "outside": ImageOps.invert(centre)}


def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = open_pipeline(args)
    inpaint = DraftAndReviseInpaintPipeline(**pipe.components, id2label=pipe.config.id2label)
    images = open_images(pipe, args)

    # No fill has the seed of an image: by the same numbers it would find again what is covered.
    seed = args.seed + len(images)
    captions, rows = ["image"], [[image] for image in images]
    for name, mask in draw_regions(images[0].size).items():
        with refusals_in_one_line():
            filled = inpaint(
                images,
                mask,
                args.fill_prompts,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(images))],
            ).images
        seed += len(images)
        captions += [name, "filled"]
        for row, image, result in zip(rows, images, filled):
            row += [cover(image, mask), result]

    titles = [
        prompt if fill_prompt == prompt else f"{prompt}, filled as {fill_prompt}"
        for prompt, fill_prompt in zip(args.prompts, args.fill_prompts)
    ]
    sections = [(title, [row]) for title, row in zip(titles, rows)]
    save_sheet(draw_sheet(sections, captions, tile=128), args.output)
    print(f"{args.output}: {len(images)} images, {(len(captions) - 1) // 2} regions each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
