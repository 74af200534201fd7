"""Shows what changes in the images when one word of a caption does (Figures 3 and 4, section D.2 of the supplement).

    python examples/caption_grid.py "a cat in the snow" "a fox in the snow" "a fox at night" --output sheet.png

A row of the sheet is a caption, with the words that not all captions have in red. Images of a column draw from the
same seed, so that the words alone are what makes them differ.
"""

import sys

import torch
from contact_sheet import draw_sheet, make_parser, open_pipeline, parse, positive_int, refusals_in_one_line, save_sheet


PROMPTS = ("a cat in the snow", "a fox in the snow", "a penguin in the snow", "a whale in the snow")


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n\n")[0], output="outputs/caption-grid.png", prompts=PROMPTS)
    parser.add_argument("--num-images", type=positive_int, default=6, help="images of each caption")
    return parse(parser, argv)


def changed_words(prompts: list[str]) -> frozenset[str]:
    """The words that are in some of the captions but not in all of them."""
    words = [set(prompt.split(" ")) for prompt in prompts]
    return frozenset(set.union(*words) - set.intersection(*words))


def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = open_pipeline(args)

    seeds = [args.seed + i for i in range(args.num_images)]
    sections = []
    for prompt in args.prompts:
        with refusals_in_one_line():
            images = pipe(
                prompt,
                num_images_per_prompt=args.num_images,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
        sections.append((prompt, [images]))
    save_sheet(draw_sheet(sections, captions=[], tile=128, marked=changed_words(args.prompts)), args.output)
    print(f"{args.output}: {len(args.prompts)} captions, seeds {seeds[0]} to {seeds[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
