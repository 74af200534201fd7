"""What the examples that draw a contact sheet share: their flags, opening a pipeline, and the sheet itself.

A mistake, be it a flag, a folder or a word to the pipeline, ends an example with one line that says what is wrong.
"""

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from rq_draft_revise import DraftAndRevisePipeline
from rq_draft_revise.images import to_rgb
from rq_draft_revise.whole_files import whole_file


REPOSITORY = Path(__file__).resolve().parents[1]
TILE = 192  # pixels: smaller images are enlarged by the largest integer factor that keeps them within it
COVER = (150, 150, 150)  # lies over what is masked


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def make_parser(description: str, output: str, prompts: tuple[str, ...] = ()) -> OneLineParser:
    """A parser with the flags of every sheet; without default `prompts` there must be some."""
    parser = OneLineParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "prompts", nargs="*" if prompts else "+", metavar="prompt", default=list(prompts), help="what to draw"
    )
    parser.add_argument(
        "--pipeline", type=Path, default=REPOSITORY / "pipelines" / "emoji-scenes", help="folder of a saved pipeline"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; image i has seed + i")
    parser.add_argument("--output", type=Path, default=Path(output), help="the PNG file to write")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu")
    return parser


def parse(parser: OneLineParser, argv=None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be between 0 and 2**63 - 1, got {args.seed}")
    if not all(prompt.strip() for prompt in args.prompts):
        parser.error("a prompt is empty; say what to draw, for example: a volcano at dusk")
    return args


def add_images(parser: OneLineParser) -> None:
    """The flag of sheets that start from images, which [`open_images`] reads."""
    parser.add_argument(
        "--images", nargs="+", type=Path, help="files to start from, one a prompt, instead of drawing the prompts"
    )


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Opening and closing
# ---------------------------------------------------------------------------------------------------------------------


def open_pipeline(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> DraftAndRevisePipeline:
    """The pipeline that the flags name, where they say; all that can be wrong about them is found here."""
    prepare_output(args.output)
    device = choose_device(args.device)
    pipe = load_pipeline(args.pipeline, dtype).to(device)
    unknown = find_unknown_words(pipe.tokenizer, [*args.prompts, *getattr(args, "fill_prompts", [])])
    if unknown:
        print(f"not in the pipeline's vocabulary, read as an unknown word: {', '.join(map(repr, unknown))}")
    return pipe


def prepare_output(path: Path):
    """Fails now, not after minutes of sampling, where `path` cannot be written."""
    if path.suffix.lower() != ".png":
        raise SystemExit(f"error: --output must name a .png file, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with open(path, "ab"):  # appending leaves an older sheet as it is
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise SystemExit(f"error: cannot write {path}: {error.strerror}") from None


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not compiled in, or not there
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"error: --device {name} cannot be used: {reason}") from None
    return device


def load_pipeline(folder: Path, dtype: torch.dtype) -> DraftAndRevisePipeline:
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"error: no pipeline at {folder}: there is no model_index.json in it")
    try:
        # With local_files_only a file missing from the folder is missing, and not a name to look up on the Hub.
        return DraftAndRevisePipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (
        Exception
    ) as error:  # a damaged file can fail anywhere in the JSON, safetensors, tokenizers or torch readers
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"error: cannot load the pipeline at {folder}: {type(error).__name__}: {reason}") from None


def find_unknown_words(tokenizer, prompts: list[str]) -> list[str]:
    """Returns the words and marks in `prompts` that the tokenizer reads as its unknown token, each once, in order."""
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    if unknown_id is None:  # no tokenizer, or a byte-level one, which knows every word
        return []
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+|[^\w\s]+", prompt))
    return [word for word in words if unknown_id in tokenizer(word, add_special_tokens=False).input_ids]


def open_images(pipe: DraftAndRevisePipeline, args: argparse.Namespace) -> list[Image.Image]:
    """An image of the model's size a prompt: read from the files of the flag, or else drawn."""
    if args.images is None:
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(args.prompts))]
        with refusals_in_one_line():
            return pipe(args.prompts, generator=generators).images
    if len(args.images) != len(args.prompts):
        raise SystemExit(f"error: --images must be {len(args.prompts)}, one a prompt, got {len(args.images)}")
    config, factor = pipe.transformer.config, pipe.vae.spatial_scale_factor
    size = (config.width * factor, config.height * factor)
    images = []
    for path in args.images:
        try:
            with Image.open(path) as image:
                images.append(to_rgb(image).resize(size, Image.Resampling.LANCZOS))
        except (OSError, ValueError) as error:  # missing, unreadable, cut short, or no image
            reason = getattr(error, "strerror", None) or error
            raise SystemExit(f"error: cannot read the image {path}: {reason}") from None
    return images


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Around calls of a pipeline, whose own checks name the argument and what it allows."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet in place of an older one, which stays where that fails."""
    try:
        with whole_file(path) as aside:
            sheet.save(aside, format="PNG", optimize=True)
    except OSError as error:
        raise SystemExit(f"error: cannot write {path}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The sheet
# ---------------------------------------------------------------------------------------------------------------------


def cover(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns `image` with grey over what is white in `mask`, which is enlarged to its size."""
    mask = mask.convert("L").resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, COVER), image.convert("RGB"), mask)


def fit(text: str, font, width: int) -> str:
    """Returns `text`, cut short with dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def draw_sheet(
    sections: list[tuple[str, list[list[Image.Image | None]]]],
    captions: list[str],
    labels: list[str] = (),
    tile: int = TILE,
    marked: frozenset[str] = frozenset(),
) -> Image.Image:
    """Lays out titled sections of rows of images.

    `sections` holds a title each, and rows in which `None` leaves a place empty; `captions` has a word for each column
    or none at all, `labels` one for each row of all sections, or none at all. All images are drawn in the size of the
    first, enlarged to `tile` pixels at most. Words of a title that are in `marked` are red.
    """
    title_font, caption_font = ImageFont.load_default(22), ImageFont.load_default(13)
    width, height = sections[0][1][0][0].size
    factor = max(1, tile // max(width, height))
    width, height = width * factor, height * factor
    gap, title = 8, 40
    caption = 22 if captions else 0
    label = gap + (72 - gap if labels else 0)

    num_columns = max(len(row) for _, rows in sections for row in rows)
    num_rows = sum(len(rows) for _, rows in sections)
    sheet_width = label + num_columns * (width + gap)
    sheet_height = len(sections) * (title + caption) + num_rows * (height + gap) + gap
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)

    row_labels = iter(labels)
    y = gap
    for text, rows in sections:
        x = gap
        for word in fit(text, title_font, sheet_width - 2 * gap).split(" "):
            draw.text((x, y), word, "firebrick" if word in marked else "black", title_font)
            x += title_font.getlength(word + " ")
        y += title
        for column, text in enumerate(captions):
            draw.text((label + column * (width + gap), y), fit(text, caption_font, width), "dimgray", caption_font)
        y += caption
        for row in rows:
            text = fit(next(row_labels, ""), caption_font, label - gap)
            draw.text((gap, y + height // 2 - 8), text, "dimgray", caption_font)
            for column, image in enumerate(row):
                if image is not None:
                    # Nearest neighbour shows the pixels that were drawn; a smooth filter would flatter them.
                    enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                    sheet.paste(enlarged, (label + column * (width + gap), y))
            y += height + gap
    return sheet
