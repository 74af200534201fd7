"""Shows the steps of a draft by strategy, and the revisions after it (Figure 2 of the paper's supplement).

    python examples/draft_steps.py "a cat in the snow" --output sheet.png

Each strategy has two rows: which positions are still masked (grey) after every 16th step of the draft, and what the
codes so far decode to. Then come the revisions. Strategies of a prompt draw from the same seed.
"""

import sys

import torch
from contact_sheet import (
    cover,
    draw_sheet,
    make_parser,
    open_pipeline,
    parse,
    positive_int,
    refusals_in_one_line,
    save_sheet,
)
from PIL import Image


PROMPTS = ("a cat in the snow", "a pumpkin at night")
SELECTIONS = ("top-c", "random")


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n\n")[0], output="outputs/draft-steps.png", prompts=PROMPTS)
    parser.add_argument(
        "--selections", nargs="+", default=list(SELECTIONS), help="strategies: top-c, top-c-50%%, random"
    )
    parser.add_argument("--num-inference-steps", type=positive_int, default=64, help="steps of the draft")
    parser.add_argument("--every", type=positive_int, default=16, help="steps of the draft from column to column")
    return parse(parser, argv)


def draw_stages(pipe, prompt: str, seed: int, selection: str, num_inference_steps: int, every: int):
    """Draws one image and keeps its codes after every so many steps of the draft and after each revision.

    Returns:
        `dict[str, torch.Tensor]`: Codes `(1, h, w, D)` by the caption of their column, in order.
    """
    stages = {}

    def collect(pipe, step_index, timestep, callback_kwargs):
        steps, codes = step_index + 1, callback_kwargs["latents"].clone()
        revised, rest = divmod(steps - num_inference_steps, pipe.scheduler.num_revise_steps)
        if steps < num_inference_steps and steps % every == 0:
            stages[f"{steps} of {num_inference_steps} steps"] = codes
        elif steps == num_inference_steps:
            stages[f"draft, {steps} steps"] = codes
        elif steps > num_inference_steps and rest == 0:
            stages[f"revision {revised}"] = codes
        return callback_kwargs

    pipe(
        prompt,
        num_inference_steps=num_inference_steps,
        selection=selection,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=collect,
    )
    return stages


def draw_mask(codes: torch.Tensor, mask_token_id: int, size: tuple[int, int]) -> Image.Image:
    """The masked positions of a code map `(1, h, w, D)` in grey, the others in black."""
    masked = (codes[0, ..., 0] == mask_token_id).cpu().numpy()
    return cover(Image.new("RGB", size), Image.fromarray(masked))


def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = open_pipeline(args)

    sections, labels = [], []
    for i, prompt in enumerate(args.prompts):
        rows = []
        for selection in args.selections:
            with refusals_in_one_line():
                stages = draw_stages(pipe, prompt, args.seed + i, selection, args.num_inference_steps, args.every)
            images = [pipe.decode_latents(codes)[0] for codes in stages.values()]
            # a revision masks one block after another and leaves nothing masked: it has no pattern to show
            masks = [
                None if name.startswith("revision") else draw_mask(codes, pipe.transformer.mask_token_id, image.size)
                for (name, codes), image in zip(stages.items(), images)
            ]
            rows += [masks, images]
            labels += [selection, ""]
        sections.append((prompt, rows))
    save_sheet(draw_sheet(sections, list(stages), labels, tile=128), args.output)
    print(f"{args.output}: {', '.join(args.selections)} for {', '.join(map(repr, args.prompts))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
