"""Draws images for prompts and shows on one contact sheet how each of them came about.

    python examples/generate.py "a volcano at dusk" "a cat in the snow" --num-images 4 --seed 0 --output sheet.png

A row of the sheet is an image; its columns are the draft half filled, the draft, and each revision. Image i of the
run (counted over all prompts) is drawn by a generator seeded with `--seed` + i: any can be made again alone.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from rq_draft_revise import DraftAndRevisePipeline


REPOSITORY = Path(__file__).resolve().parents[1]
BATCH_SIZE = 16  # images sampled at a time, so that memory does not grow with the length of the run
TILE = 192  # pixels: smaller images are enlarged by the largest integer factor that keeps them within it


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_args(argv=None):
    parser = OneLineParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("prompts", nargs="+", metavar="prompt", help="what to draw; several prompts share one sheet")
    parser.add_argument(
        "--pipeline", type=Path, default=REPOSITORY / "pipelines" / "emoji-scenes", help="folder of a saved pipeline"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; image i has seed + i")
    parser.add_argument("--num-images", type=positive_int, default=4, help="images of each prompt")
    parser.add_argument("--output", type=Path, default=Path("outputs/generate.png"), help="the PNG file to write")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")

    sampling = parser.add_argument_group("sampling, by default as saved with the pipeline")
    sampling.add_argument("--num-inference-steps", type=int, help="steps of the draft")
    sampling.add_argument("--num-revise-steps", type=int, help="steps of one revision")
    sampling.add_argument("--num-revisions", type=int, help="revisions; 0 keeps the draft")
    sampling.add_argument("--guidance-scale", type=float, help="guidance of the revisions; 1 is none")
    sampling.add_argument("--temperature", type=float, help="temperature of the revisions")
    sampling.add_argument("--selection", help="which positions a draft step keeps: random, top-c or top-c-50%%")
    args = parser.parse_args(argv)

    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be between 0 and 2**63 - 1, got {args.seed}")
    if not all(prompt.strip() for prompt in args.prompts):
        parser.error("a prompt is empty; say what to draw, for example: a volcano at dusk")
    return args


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


def fit(text: str, font, width: int) -> str:
    """Returns `text`, cut short with dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def draw_sheet(sections: list[tuple[str, list[list[Image.Image]]]], captions: list[str], seeds: list[int]):
    """Lays out a titled section a prompt, with a row an image, labelled with its seed, and a column a stage.

    `sections` holds for each prompt the rows of its images.
    """
    title_font, caption_font = ImageFont.load_default(22), ImageFont.load_default(13)
    width, height = sections[0][1][0][0].size
    factor = max(1, TILE // max(width, height))
    width, height = width * factor, height * factor
    gap, label, title, caption = 8, 72, 40, 22

    num_rows = sum(len(rows) for _, rows in sections)
    sheet_width = label + len(captions) * (width + gap) + gap
    sheet_height = len(sections) * (title + caption) + num_rows * (height + gap) + gap
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)

    labels = (f"seed {seed}" for seed in seeds)
    y = gap
    for prompt, rows in sections:
        draw.text((gap, y), fit(prompt, title_font, sheet_width - 2 * gap), "black", title_font)
        y += title
        for column, text in enumerate(captions):
            draw.text((label + column * (width + gap), y), fit(text, caption_font, width), "dimgray", caption_font)
        y += caption
        for row in rows:
            draw.text(
                (gap, y + height // 2 - 8), fit(next(labels), caption_font, label - gap), "dimgray", caption_font
            )
            for column, image in enumerate(row):
                # Nearest neighbour shows the pixels that were drawn; a smooth filter would flatter them.
                enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (label + column * (width + gap), y))
            y += height + gap
    return sheet


def main(argv=None) -> int:
    args = parse_args(argv)
    prepare_output(args.output)
    device = choose_device(args.device)
    pipe = load_pipeline(args.pipeline, getattr(torch, args.dtype)).to(device)

    unknown = find_unknown_words(pipe.tokenizer, args.prompts)
    if unknown:
        print(f"not in the pipeline's vocabulary, read as an unknown word: {', '.join(map(repr, unknown))}")

    names = ("num_inference_steps", "num_revise_steps", "num_revisions", "guidance_scale", "temperature", "selection")
    sampling = {name: getattr(args, name) for name in names}  # None takes the pipeline's default
    prompts = [prompt for prompt in args.prompts for _ in range(args.num_images)]
    seeds = [args.seed + i for i in range(len(prompts))]
    rows, seconds = [], 0.0
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        try:
            captions, batch_rows, batch_seconds = draw_batch(pipe, prompts[batch], seeds[batch], **sampling)
        except ValueError as error:  # the pipeline's own checks name the argument and what it allows
            raise SystemExit(f"error: {' '.join(str(error).split())}") from None
        rows += batch_rows
        seconds += batch_seconds

    sections = [
        (prompt, rows[i * args.num_images : (i + 1) * args.num_images]) for i, prompt in enumerate(args.prompts)
    ]
    sheet = draw_sheet(sections, captions, seeds)
    try:
        sheet.save(args.output)
    except OSError as error:
        raise SystemExit(f"error: cannot write {args.output}: {error.strerror or error}") from None
    print(
        f"{args.output}: {len(rows)} image{'s' * (len(rows) != 1)} in {seconds:.1f} s, "
        f"{seconds / len(rows):.2f} s each ({device}, {args.dtype})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
