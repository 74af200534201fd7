"""Covers a random half of the positions of images and fills them in (Figure 6, section D.4 of the supplement).

    python examples/infill_random_mask.py "a cat in the snow" --num-masks 3 --output sheet.png

A triplet of the sheet is an image, its half that the model is given, and that half completed. The image is drawn from
its prompt, or is a file of yours. What is not covered comes back byte for byte.
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
    positive_int,
    refusals_in_one_line,
    save_sheet,
)
from PIL import Image

from rq_draft_revise import DraftAndReviseInpaintPipeline


PROMPTS = ("a cat in the snow", "a pumpkin at night", "a snowman on the grass", "a cactus in the desert")


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n\n")[0], output="outputs/infill-random-mask.png", prompts=PROMPTS)
    parser.add_argument(
        "--num-masks", type=positive_int, default=2, help="masks of each image, so many triplets a row"
    )
    add_images(parser)
    return parse(parser, argv)


def draw_half_masks(num_masks: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Masks `(num_masks, height, width)` bool, each with a random half of its positions True."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_masks, height * width, generator=generator).argsort(dim=1)
    # of equal shares; an odd number of positions leaves one more known than masked
    return (order < height * width // 2).view(num_masks, height, width)


def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = open_pipeline(args)
    inpaint = DraftAndReviseInpaintPipeline(**pipe.components, id2label=pipe.config.id2label)
    images = open_images(pipe, args)
    config = pipe.transformer.config

    # No mask and no fill has the seed of an image: by the same numbers it would find again what is covered.
    seed = args.seed + len(images)
    rows = [[] for _ in images]
    for _ in range(args.num_masks):
        masks = draw_half_masks(len(images), config.height, config.width, seed)
        with refusals_in_one_line():
            filled = inpaint(
                images,
                mask=masks,
                prompt=args.prompts,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(images))],
            ).images
        seed += len(images)
        for row, image, mask, result in zip(rows, images, masks, filled):
            row += [image, cover(image, Image.fromarray(mask.numpy())), result]

    sections = [(prompt, [row]) for prompt, row in zip(args.prompts, rows)]
    save_sheet(draw_sheet(sections, ["image", "half of it", "infilled"] * args.num_masks, tile=128), args.output)
    print(f"{args.output}: {len(images)} images, {args.num_masks} masks each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
