"""Draws the picture of the two phases in docs/how-it-works.md: what each step sees, predicts and leaves behind.

    python examples/two_phases.py "a castle by the sea" --output sheet.png

All of it is real: the partitions, the code maps and the decoded images are those of one call of the pipeline. A code
stack has the colour of the sum of its codebook vectors, by its first three principal components: similar colours are
similar stacks. What is masked is empty.
"""

import sys
from typing import NamedTuple

import torch
from contact_sheet import make_parser, open_pipeline, parse, positive_int, refusals_in_one_line, save_sheet
from PIL import Image, ImageDraw, ImageFont


PROMPT = "a castle by the sea"
BLOCK = (255, 140, 0)  # frames what a step predicts
COLUMNS = 5  # the partition and four steps; or the draft and four revisions
EMPTY = (255, 255, 255)
TILE, GAP, LABEL = 128, 10, 96


class Step(NamedTuple):
    """A step of the sampler: code maps `(1, h, w, D)`, and the row-major positions of its block `(n,)`."""

    seen: torch.Tensor  # with the block and, in a draft, all later blocks masked
    block: torch.Tensor
    codes: torch.Tensor  # afterwards


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n\n")[0], output="outputs/two-phases.png", prompts=(PROMPT,))
    parser.add_argument("--num-inference-steps", type=positive_int, default=8, help="steps of the draft")
    parser.add_argument("--num-revise-steps", type=positive_int, default=4, help="steps of one revision")
    parser.add_argument("--num-revisions", type=positive_int, default=4, help="revisions")
    args = parse(parser, argv)
    if len(args.prompts) != 1:
        parser.error(f"the picture is of one prompt, got {len(args.prompts)}")
    return args


def draw_steps(pipe, prompt: str, seed: int, num_inference_steps: int, **sampling) -> tuple[list[Step], list[Step]]:
    """The steps of the draft, and those of all revisions, of one image."""
    after = []

    def collect(pipe, step_index, timestep, callback_kwargs):
        after.append(callback_kwargs["latents"].clone())
        return callback_kwargs

    pipe(
        prompt,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=collect,
        **sampling,
    )
    before = [pipe.prepare_latents(1), *after[:-1]]
    steps = []
    for timestep, (old, new) in enumerate(zip(before, after)):
        step = pipe.scheduler.get_step_input(old, timestep)  # the partitions of the last call are still there
        steps.append(Step(step.codes, step.positions[0], new))
    return steps[:num_inference_steps], steps[num_inference_steps:]


def spread(num_steps: int, number: int = COLUMNS - 1) -> list[int]:
    """At most `number` of the steps 0, 1, ..., the first and the last among them."""
    return sorted({round(i * (num_steps - 1) / max(number - 1, 1)) for i in range(number)})


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


class Palette:
    """Colours of code stacks, by the principal components of those in `maps`."""

    def __init__(self, vae, maps: list[torch.Tensor]):
        self.vae = vae
        vectors = torch.cat([self._vectors(codes)[self._known(codes)] for codes in maps])
        self.center = vectors.mean(dim=0)
        _, _, components = torch.linalg.svd(vectors - self.center, full_matrices=False)
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        self.components = (components * largest.sign())[:3]  # the sign of a component means nothing
        values = (vectors - self.center) @ self.components.mT
        self.low, self.high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)

    def _vectors(self, codes: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.vae.embed_codes(codes)[0].flatten(1).mT.float().cpu()  # (N, C)

    def _known(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes[0, ..., 0] != self.vae.mask_token_id).flatten().cpu()  # (N,)

    def __call__(self, codes: torch.Tensor) -> list[tuple[int, int, int]]:
        """A colour a position of `(1, h, w, D)`, in row-major order."""
        values = ((self._vectors(codes) - self.center) @ self.components.mT - self.low) / (self.high - self.low)
        levels = (40 + 185 * values.clamp(0, 1)).int().tolist()
        return [tuple(level) if known else EMPTY for level, known in zip(levels, self._known(codes).tolist())]


def tile_cells(shape: tuple[int, int]) -> tuple[Image.Image, int]:
    """An empty tile for a map of `shape`, and the side of its cells in pixels."""
    side = max(6, TILE // max(shape))
    return Image.new("RGB", (side * shape[1], side * shape[0]), "white"), side


def draw_cell(draw: ImageDraw.ImageDraw, x: int, y: int, side: int, colour, framed: bool = False):
    corners = (x, y, x + side - 2, y + side - 2)
    draw.rectangle(corners, fill=colour, outline=(205, 205, 205) if colour == EMPTY else None)
    if framed:
        draw.rectangle(corners, outline=BLOCK, width=max(2, side // 6))


def draw_map(colours, shape: tuple[int, int], block: torch.Tensor) -> Image.Image:
    """A code map in colours, with frames around the positions of a block."""
    tile, side = tile_cells(shape)
    draw, framed = ImageDraw.Draw(tile), set(block.tolist())
    for position, colour in enumerate(colours):
        x, y = position % shape[1] * side, position // shape[1] * side
        draw_cell(draw, x, y, side, colour, position in framed)
    return tile


def draw_partition(blocks: list[torch.Tensor], shape: tuple[int, int]) -> Image.Image:
    """The number of its block, counted from 1, in each position."""
    tile, side = tile_cells(shape)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(max(6, side * 13 // 20))
    for number, block in enumerate(blocks, start=1):
        shade = 235 - round(85 * (number - 1) / max(len(blocks) - 1, 1))
        for position in block.tolist():
            x, y = position % shape[1] * side, position // shape[1] * side
            draw_cell(draw, x, y, side, (shade, shade, 245))
            draw.text((x + side / 2 - 1, y + side / 2 - 1), str(number), "black", font, anchor="mm")
    return tile


# ---------------------------------------------------------------------------------------------------------------------
# The sheet
# ---------------------------------------------------------------------------------------------------------------------


class Sheet:
    """A white sheet that is filled from above."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (LABEL + COLUMNS * (TILE + GAP), height), "white")
        self.draw, self.y = ImageDraw.Draw(self.image), GAP

    def write(self, text: str, size: int, x: int = GAP, colour: str = "black"):
        self.draw.text((x, self.y), text, colour, ImageFont.load_default(size))
        self.y += round(1.6 * size)

    def captions(self, texts: list[str]):
        for column, text in enumerate(texts):
            place = (LABEL + column * (TILE + GAP), self.y)
            self.draw.text(place, text, "dimgray", ImageFont.load_default(13))
        self.y += 21

    def row(self, label: str, tiles: list[Image.Image | None]):
        font = ImageFont.load_default(13)
        self.draw.multiline_text((GAP, self.y + TILE // 2 - 16), label, "dimgray", font, spacing=3)
        for column, tile in enumerate(tiles):
            if tile is not None:
                factor = max(1, TILE // max(tile.size))
                tile = tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
                tile.thumbnail((TILE, TILE))
                self.image.paste(tile, (LABEL + column * (TILE + GAP), self.y))
        self.y += TILE + GAP

    def legend(self, colour):
        font, x = ImageFont.load_default(13), GAP
        entries = (
            ("masked", EMPTY, False),
            ("masked, predicted in this step", EMPTY, True),
            ("a code stack: similar stacks, similar colours", colour, False),
            ("just predicted", colour, True),
        )
        for text, fill, framed in entries:
            draw_cell(self.draw, x, self.y, 20, fill, framed)
            self.draw.text((x + 26, self.y + 1), text, "dimgray", font)
            x += 26 + round(font.getlength(text)) + 22
        self.y += 34


def draw_phases(pipe, draft: list[Step], revisions: list[Step], num_revise_steps: int) -> Image.Image:
    config = pipe.transformer.config
    shape = (config.height, config.width)
    palette = Palette(pipe.vae, [step.codes for step in draft + revisions])
    sheet = Sheet(34 + 3 * 78 + 7 * (TILE + GAP) + 2 * GAP)
    sheet.legend(palette(draft[-1].codes)[0])

    first = revisions[:num_revise_steps]
    phases = (
        ("Draft", "from an empty map, one block of a random partition after another", draft),
        (
            f"Revise, 1 of {len(revisions) // num_revise_steps}",
            "a fresh partition; each block is predicted anew, with all others in view",
            first,
        ),
    )
    for title, text, steps in phases:
        shown = spread(len(steps))
        sheet.write(title, 22)
        sheet.y -= 4
        sheet.write(text, 14)
        sheet.captions(["partition into blocks", *(f"step {i + 1} of {len(steps)}" for i in shown)])
        partition = draw_partition([step.block for step in steps], shape)
        steps = [steps[i] for i in shown]
        seen = [draw_map(palette(step.seen), shape, step.block) for step in steps]
        sheet.row("what the\ntransformer\nsees", [partition, *seen])
        sheet.row("codes\nafter the\nstep", [None, *(draw_map(palette(s.codes), shape, s.block) for s in steps)])
        sheet.row("decoded", [None, *(pipe.decode_latents(step.codes)[0] for step in steps)])

    last = [draft[-1], *revisions[num_revise_steps - 1 :: num_revise_steps]]
    shown = spread(len(last), COLUMNS)
    sheet.write("The image", 22)
    sheet.y -= 4
    sheet.write("after the draft and after each revision", 14)
    sheet.captions(["draft" if i == 0 else f"revision {i}" for i in shown])
    sheet.row("decoded", [pipe.decode_latents(last[i].codes)[0] for i in shown])
    return sheet.image


def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = open_pipeline(args)
    names = ("num_inference_steps", "num_revise_steps", "num_revisions")
    with refusals_in_one_line():
        draft, revisions = draw_steps(
            pipe, args.prompts[0], args.seed, **{name: getattr(args, name) for name in names}, selection="random"
        )
    save_sheet(draw_phases(pipe, draft, revisions, args.num_revise_steps), args.output)
    print(f"{args.output}: {len(draft)} steps of the draft, {args.num_revisions} revisions of {args.num_revise_steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
