#!/usr/bin/env python
# Copyright 2026 The rq_draft_revise authors
# SPDX-License-Identifier: Apache-2.0
"""Emoji scenes: a text-to-image data set that anyone can rebuild without a download.

A scene is one glyph of Noto Color Emoji standing in front of one procedural backdrop: "a volcano at dusk", "a cat in
the snow". About one pair of object and backdrop in ten is held out of training, *volcano at dusk* always among them,
so that a model's image of it shows a composition it has never seen.

`build` draws the data set. `evaluate` asks a small classifier, trained on the real scenes alone, whether a pipeline's
images show the object and the backdrop that their prompts name: after the draft and after each revision, for seen
pairs and for held-out pairs.

    python examples/emoji_scenes.py build --output_dir data/emoji-scenes
    python examples/emoji_scenes.py evaluate --pipeline pipelines/emoji-scenes --dataset data/emoji-scenes
"""

import argparse
import functools
import hashlib
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont


# ---------------------------------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------------------------------

# The first 40 are the ones easiest to tell apart at 64x64: each has its own colours and its own outline. The rest are
# in no order but that animals, plants and food, and things stand together. Only append: a scene's seed holds its
# object's place in this table. Left out are glyphs that are a whole square scene, plurals, and flags, hands and signs.
GLYPHS = (
    "🌋🐱🤖🍎🍌🌵🎃🐸🐧🦋"
    "🚗🚀🐙☔🎈👻⛄🍄🌻🍉"
    "🐘🦒🦩🐼🦊🐠🐢🚲⛵🎸"
    "🍩🎩💎🏰🎄🐳🍦⚽🚜👽"
    # animals
    "🦀🦜🐞🦄🐷🐮🐔🦉🦈🐌🐝🦖🐫🦘🦓🐅🦁🐭🐰🐻🐨🐵🐴🦆🦢🦚🐊🐍🦔🦇🦂🦞🐬🐑🐹"
    # plants and food
    "🥕🍓🌹🌷🌴🌲🍕🍔🎂🍍🥑🍋🍐🍆🌽🍭"
    # things
    "⏰🎁🔔👑🏠🚁🎺🚂🧸⚓💡📷📺🎻🥁🚌🚒🛸🗿👟🔑🎡🪑🧲"
)

# Only where the Unicode name is clumsy in a caption.
SHORTER_NAMES = {
    "🐱": "cat",
    "🎃": "pumpkin",
    "🐸": "frog",
    "🚗": "car",
    "☔": "umbrella",
    "⛄": "snowman",
    "🍉": "watermelon slice",
    "🦒": "giraffe",
    "🐼": "panda",
    "🦊": "fox",
    "🎩": "top hat",
    "💎": "gem",
    "🏰": "castle",
    "🎄": "christmas tree",
    "🐳": "whale",
    "🍦": "ice cream",
    "⚽": "football",
    "👽": "alien",
    "🐞": "ladybird",
    "🦄": "unicorn",
    "🐷": "pig",
    "🐮": "cow",
    "🐝": "bee",
    "🐫": "camel",
    "🦓": "zebra",
    "🦁": "lion",
    "🐭": "mouse",
    "🐰": "rabbit",
    "🐻": "bear",
    "🐵": "monkey",
    "🐴": "horse",
    "🐹": "hamster",
    "🌲": "fir tree",
    "🍕": "pizza slice",
    "🎂": "birthday cake",
    "🌽": "corn cob",
    "🎁": "present",
    "🏠": "house",
    "🚂": "steam train",
    "💡": "light bulb",
    "🥁": "drum",
    "🗿": "stone head",
    "👟": "shoe",
}

# Name in captions -> character: {"volcano": "🌋", "cat": "🐱", ...}.
OBJECTS: dict[str, str] = {SHORTER_NAMES.get(glyph, unicodedata.name(glyph).lower()): glyph for glyph in GLYPHS}


# ---------------------------------------------------------------------------------------------------------------------
# Backdrops: each draws an (S, S, 3) float array in [0, 255] from a seeded generator
# ---------------------------------------------------------------------------------------------------------------------

Color = tuple[float, float, float]


def vertical_gradient(size: int, stops: list[tuple[float, Color]]) -> np.ndarray:
    """A `(size, size, 3)` float array whose rows run through `stops`: (distance from the top in [0, 1], colour)."""
    rows = (np.arange(size) + 0.5) / size
    positions = [position for position, _ in stops]
    channels = [np.interp(rows, positions, [color[channel] for _, color in stops]) for channel in range(3)]
    return np.repeat(np.stack(channels, axis=-1)[:, None, :], size, axis=1)


def varied(color: Color, rng: np.random.Generator, spread: float = 10.0) -> Color:
    """`color` a little brighter or darker and a little warmer or colder: the same place on another day."""
    brightness, warmth = rng.uniform(-spread, spread, size=2)
    return (color[0] + brightness + warmth / 2, color[1] + brightness, color[2] + brightness - warmth / 2)


def add_glow(canvas: np.ndarray, x: float, y: float, radius: float, color: Color, strength: float) -> None:
    """Blend a Gaussian glow of `color` into `canvas`, in place; `x`, `y` and `radius` are fractions of the side."""
    size = canvas.shape[0]
    grid = (np.arange(size) + 0.5) / size
    distance = (grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2
    weight = strength * np.exp(-distance / (2 * radius**2))
    canvas += weight[..., None] * (np.asarray(color) - canvas)


def add_disc(canvas: np.ndarray, x: float, y: float, radius: float, color: Color) -> None:
    """Paint a disc into `canvas`, in place; `x`, `y` and `radius` are fractions of the side."""
    size = canvas.shape[0]
    grid = (np.arange(size) + 0.5) / size
    canvas[(grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2 < radius**2] = color


def add_ground(
    canvas: np.ndarray, height: float, wave: float, near: Color, far: Color, rng: np.random.Generator
) -> None:
    """Paint ground into `canvas`, in place, from a gently waving line down.

    `height`, the line's mean distance from the top, and `wave`, its amplitude, are fractions of the side.
    """
    size = canvas.shape[0]
    grid = (np.arange(size) + 0.5) / size
    phase, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.2)
    line = height + wave * np.sin(2 * math.pi * frequency * grid + phase)  # (size,)
    depth = np.clip((grid[:, None] - line[None, :]) / (1 - height), 0, 1)  # 0 at the line, 1 at the bottom
    ground = np.asarray(far) + depth[..., None] * (np.asarray(near) - np.asarray(far))
    below = grid[:, None] >= line[None, :]
    canvas[below] = ground[below]


def draw_dusk(size: int, rng: np.random.Generator) -> np.ndarray:
    # The ground keeps some of the sky's light: on a black one the dark foot of the volcano could not be seen.
    canvas = vertical_gradient(
        size,
        [(0.0, varied((62, 44, 128), rng)), (0.4, varied((168, 86, 168), rng)), (0.76, varied((255, 186, 138), rng))],
    )
    x = rng.uniform(0.12, 0.88)
    add_glow(canvas, x, 0.72, 0.18, (255, 226, 150), 0.8)
    add_disc(canvas, x, 0.72, rng.uniform(0.09, 0.12), (255, 242, 190))
    add_ground(canvas, 0.76, 0.015, near=(84, 62, 112), far=varied((132, 92, 140), rng), rng=rng)
    return canvas


def draw_snow(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((172, 196, 218), rng)), (0.7, varied((216, 226, 236), rng, 5))])
    add_ground(canvas, rng.uniform(0.66, 0.72), 0.03, near=(255, 255, 255), far=(238, 243, 250), rng=rng)
    for _ in range(rng.integers(22, 32)):
        add_disc(canvas, *rng.uniform(0, 1, size=2), rng.uniform(0.011, 0.02), (255, 255, 255))
    return canvas


def draw_night(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((8, 12, 44), rng, 5)), (0.8, varied((28, 44, 104), rng))])
    for _ in range(rng.integers(16, 26)):
        brightness = rng.uniform(180, 255)
        add_disc(canvas, rng.uniform(0, 1), rng.uniform(0, 0.72), 0.011, (brightness, brightness, brightness * 0.95))
    if rng.uniform() < 0.7:
        x, y = rng.choice([rng.uniform(0.1, 0.25), rng.uniform(0.75, 0.9)]), rng.uniform(0.1, 0.2)
        add_glow(canvas, x, y, 0.1, (150, 160, 210), 0.6)
        add_disc(canvas, x, y, rng.uniform(0.06, 0.08), (250, 246, 214))
    add_ground(canvas, 0.78, 0.02, near=(6, 14, 26), far=varied((14, 30, 48), rng, 4), rng=rng)
    return canvas


def draw_grass(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((112, 190, 250), rng)), (0.7, varied((196, 230, 255), rng, 5))])
    for _ in range(rng.integers(1, 3)):  # a cloud is three discs in a row
        x, y = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.25)
        for step in (-1, 0, 1):
            add_disc(canvas, x + 0.07 * step, y, 0.05 + 0.02 * (step == 0), (255, 255, 255))
    add_ground(canvas, rng.uniform(0.64, 0.7), 0.02, near=varied((50, 140, 44), rng), far=(116, 194, 70), rng=rng)
    return canvas


def draw_desert(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((250, 204, 120), rng)), (0.65, varied((255, 236, 190), rng, 5))])
    add_disc(canvas, rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.18), 0.075, (255, 252, 224))
    add_ground(canvas, 0.6, 0.05, near=varied((208, 136, 70), rng), far=varied((226, 162, 92), rng), rng=rng)
    add_ground(canvas, 0.74, 0.04, near=varied((190, 112, 52), rng), far=varied((218, 146, 76), rng), rng=rng)
    return canvas


def draw_sea(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((150, 214, 248), rng)), (0.45, varied((222, 242, 250), rng, 5))])
    add_ground(canvas, 0.45, 0.0, near=varied((30, 150, 180), rng), far=varied((18, 92, 160), rng), rng=rng)
    for _ in range(rng.integers(10, 16)):  # short bright crests
        left, top, length = rng.uniform(-0.1, 1), rng.uniform(0.48, 0.7), rng.uniform(0.06, 0.14)
        columns = slice(max(0, round(left * size)), max(0, round((left + length) * size)))
        canvas[round(top * size) : round(top * size) + max(1, size // 64), columns] = (196, 236, 244)
    add_ground(canvas, rng.uniform(0.76, 0.8), 0.02, near=(238, 214, 156), far=(250, 234, 190), rng=rng)
    return canvas


def draw_rain(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((84, 92, 102), rng)), (0.75, varied((148, 156, 164), rng))])
    add_ground(canvas, 0.76, 0.01, near=(62, 68, 76), far=varied((92, 98, 106), rng, 5), rng=rng)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    slant = rng.uniform(-0.05, 0.05)
    for x, y in rng.uniform(0, 1, size=(rng.integers(28, 40), 2)):
        drop = [(x * size, y * size), ((x + slant) * size, (y + 0.13) * size)]
        pen.line(drop, fill=(198, 212, 226), width=max(1, size // 64))
    return np.asarray(image, dtype=np.float64)


def draw_under_water(size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = vertical_gradient(size, [(0.0, varied((74, 214, 206), rng)), (0.9, varied((0, 84, 112), rng))])
    add_ground(canvas, rng.uniform(0.84, 0.88), 0.03, near=(36, 92, 84), far=varied((70, 130, 110), rng), rng=rng)
    for _ in range(rng.integers(8, 14)):  # a bubble is a bright disc with a duller one inside
        x, y, radius = rng.uniform(0, 1), rng.uniform(0, 0.8), rng.uniform(0.02, 0.04)
        add_disc(canvas, x, y, radius, (214, 255, 250))
        add_disc(canvas, x, y, radius * 0.55, (110, 206, 206))
    return canvas


# The phrase in captions -> how to draw it. Only append, as with the objects.
BACKDROPS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "at dusk": draw_dusk,
    "in the snow": draw_snow,
    "at night": draw_night,
    "on the grass": draw_grass,
    "in the desert": draw_desert,
    "by the sea": draw_sea,
    "in the rain": draw_rain,
    "under water": draw_under_water,
}


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and captions
# ---------------------------------------------------------------------------------------------------------------------

HELD_OUT_SHARE = 0.1

Pair = tuple[str, str]


def pairs(num_objects: int = 40, num_backdrops: int = 6) -> tuple[list[Pair], list[Pair]]:
    """Split the pairs of the first `num_objects` objects and first `num_backdrops` backdrops into seen and held out.

    A tenth of the pairs (at least one) is held out, spread evenly: with up to ten backdrops an object lacks at most
    one of them, and the backdrops lack equally many objects, give or take one. The split depends on the two numbers
    alone, never on a seed, and always holds out *volcano at dusk*.

    Returns:
        `(seen, held_out)`: two disjoint lists of (object, backdrop), in the order of the tables.
    """
    for argument, value, largest in (
        ("num_objects", num_objects, len(OBJECTS)),
        ("num_backdrops", num_backdrops, len(BACKDROPS)),
    ):
        if not 2 <= value <= largest:
            raise ValueError(f"`{argument}` must be from 2 to {largest}, got {value}.")
    objects, backdrops = list(OBJECTS)[:num_objects], list(BACKDROPS)[:num_backdrops]

    # The volcano, which is object 0, comes first and so meets backdrop 0, the dusk. The others come in a fixed random
    # order, or the pairs held out would be a diagonal of the table. A further round meets each object's next backdrop.
    order = [0, *(1 + np.random.default_rng(0).permutation(num_objects - 1))]
    count = max(1, round(HELD_OUT_SHARE * num_objects * num_backdrops))
    held_out = set()
    for k in range(count):
        turn, place = divmod(k, num_objects)
        held_out.add((objects[order[place]], backdrops[(place + turn) % num_backdrops]))

    every = [(name, backdrop) for name in objects for backdrop in backdrops]
    return [pair for pair in every if pair not in held_out], [pair for pair in every if pair in held_out]


def with_article(name: str) -> str:
    """`name` with its indefinite article; "unicorn" begins with a vowel but not with a vowel's sound."""
    vowel = name[0] in "aeiou" and not name.startswith("uni")
    return f"{'an' if vowel else 'a'} {name}"


def captions(object: str, backdrop: str) -> list[str]:
    """The captions of a scene, at most twelve words each. The first, "a volcano at dusk", is the plain one."""
    thing = with_article(object)
    return [
        f"{thing} {backdrop}",
        f"{object} {backdrop}",
        f"{backdrop}, {thing}",
        f"a picture of {thing} {backdrop}",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------

FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora up to 37
    "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",  # Alpine
)
GLYPH_SIZE = 109  # the one size at which Noto Color Emoji holds its bitmaps


class FontNotFoundError(FileNotFoundError):
    """Noto Color Emoji is not installed; the message says how to get it."""


def find_font(font: str | os.PathLike | None = None) -> str:
    """The path of NotoColorEmoji.ttf: `font` where given, else the usual places, else what fontconfig knows."""
    found = [font] if font is not None else list(FONT_PLACES)
    if font is None and shutil.which("fc-match"):
        command = ["fc-match", "--format=%{file}", "Noto Color Emoji"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    for place in found:
        # fc-match always answers, with some other font if need be.
        if os.path.isfile(place) and (font is not None or "NotoColorEmoji" in os.path.basename(place)):
            return str(place)
    where = f"at {font}" if font is not None else "on this system"
    raise FontNotFoundError(
        f"The font Noto Color Emoji was not found {where}: install the Debian package fonts-noto-color-emoji "
        "(`apt-get install -y fonts-noto-color-emoji`) or give the path of NotoColorEmoji.ttf with --font."
    )


@functools.cache  # drawing a glyph takes longer than drawing a scene
def draw_glyph(object: str, font: str) -> Image.Image:
    """The RGBA glyph of an object, cropped to its alpha box."""
    canvas = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE), (0, 0, 0, 0))
    face = ImageFont.truetype(font, GLYPH_SIZE)
    ImageDraw.Draw(canvas).text((GLYPH_SIZE // 4, GLYPH_SIZE // 4), OBJECTS[object], font=face, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"The font {font} draws nothing for {OBJECTS[object]!r} ({object}); is it too old?")
    return canvas.crop(box)


def draw_scene(
    object: str, backdrop: str, resolution: int, rng: np.random.Generator, font: str | os.PathLike | None = None
) -> Image.Image:
    """Draw one scene: the object, mirrored or not, standing near the ground of the backdrop.

    Args:
        object: A key of `OBJECTS`.
        backdrop: A key of `BACKDROPS`.
        resolution: The side of the image in pixels.
        rng: All that varies is drawn from it, so equal generators give equal pixels.
        font: The path of NotoColorEmoji.ttf; found by `find_font` where None.

    Returns:
        An RGB image of `resolution` x `resolution`.
    """
    # Drawn at twice the size, then averaged: the discs and the horizon come out antialiased.
    canvas = BACKDROPS[backdrop](2 * resolution, rng).clip(0, 255).round().astype(np.uint8)
    scene = Image.fromarray(canvas).reduce(2)

    glyph = draw_glyph(object, find_font(font) if font is None else str(font))
    scale = rng.uniform(0.66, 0.84) * resolution / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    # Pillow resizes RGBA with premultiplied alpha, so no dark fringe comes in from the transparent pixels.
    glyph = glyph.resize((width, height), Image.Resampling.LANCZOS)
    if rng.uniform() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    middle, foot = rng.uniform(0.44, 0.56) * resolution, rng.uniform(0.88, 0.95) * resolution
    scene.paste(glyph, (round(middle - width / 2), round(foot - height)), mask=glyph)
    return scene


# ---------------------------------------------------------------------------------------------------------------------
# build
# ---------------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "test", "held_out")
ROWS_PER_SHARD = 50_000

DATA_CARD = """\
---
license: apache-2.0
task_categories:
- text-to-image
language:
- en
pretty_name: Emoji scenes
size_categories:
- {size_category}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
  - split: held_out
    path: data/held_out-*
---
# Emoji scenes

{num_objects} objects before {num_backdrops} backdrops at {resolution}x{resolution}, with captions such as *{caption}*.

| split | scenes | pairs of object and backdrop |
|---|---|---|
| train | {train} | {num_seen} |
| test | {test} | the same {num_seen} |
| held_out | {held_out} | {num_held_out} others, never in train or test |

Columns: `image` (PNG), `text` (one of four caption templates), `object` and `backdrop` (class labels).

**Held out:** {held_out_pairs}.

**Objects:** {objects}.

**Backdrops:** {backdrops}.

## How it was built

    python examples/emoji_scenes.py build {command}

Glyphs of Noto Color Emoji, named by Unicode, are pasted with random size, place and mirroring over backdrops that the
script draws. The same seed gives the same pixels with the same versions of the font, Pillow and NumPy (here Pillow
{pillow_version}, NumPy {numpy_version}, font SHA-256 beginning with `{font_digest}`).

## Licence

The font Noto Color Emoji is under the SIL Open Font License 1.1, its images under Apache-2.0 (Copyright Google Inc.).
The scenes are under Apache-2.0.
"""


def scene_generator(seed: int, split: str, object: str, backdrop: str, index: int) -> np.random.Generator:
    """Every scene has its own generator: neither worker count nor how much else is drawn changes its pixels."""
    key = [seed, SPLITS.index(split), list(OBJECTS).index(object), list(BACKDROPS).index(backdrop), index]
    return np.random.default_rng(key)


Row = tuple[bytes, str, str, str]


def draw_pair(pair: Pair, split: str, num_scenes: int, resolution: int, seed: int, font: str) -> list[Row]:
    """The rows (PNG bytes, text, object, backdrop) of one pair in one split."""
    rows = []
    for index in range(num_scenes):
        rng = scene_generator(seed, split, *pair, index)
        image = draw_scene(*pair, resolution, rng, font)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        choices = captions(*pair)
        rows.append((buffer.getvalue(), choices[rng.integers(len(choices))], *pair))
    return rows


def draw_split(
    split: str, split_pairs: list[Pair], num_scenes: int, resolution: int, seed: int, font: str, num_proc: int
) -> Iterator[Row]:
    """The rows of all pairs in one split, pair by pair, whatever the number of workers."""
    draw = functools.partial(
        draw_pair, split=split, num_scenes=num_scenes, resolution=resolution, seed=seed, font=font
    )
    if num_proc == 1:
        for pair in split_pairs:
            yield from draw(pair)
    else:
        pool = ProcessPoolExecutor(num_proc)
        try:
            for rows in pool.map(draw, split_pairs):
                yield from rows
        finally:
            pool.shutdown(cancel_futures=True)  # a `with` would have a killed build draw all the other pairs first


def is_emoji_scenes(folder: Path) -> bool:
    """Whether `folder` is empty or holds what `build` writes and nothing else: only such a folder is ever replaced."""
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"not a folder"}
    return entries <= {"data", "README.md"}


def build(args: argparse.Namespace) -> None:
    """Write the data set aside and rename it into place, so that a killed build leaves nothing at `output_dir`."""
    output_dir = Path(args.output_dir).absolute()
    if output_dir.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output_dir} exists already: give --overwrite to replace it.")
    if output_dir.exists() and not is_emoji_scenes(output_dir):
        raise FileExistsError(f"{args.output_dir} is not a data set of this script, so --overwrite leaves it alone.")
    font = find_font(args.font)
    seen, held_out = pairs(args.num_objects, args.num_backdrops)
    objects, backdrops = list(OBJECTS)[: args.num_objects], list(BACKDROPS)[: args.num_backdrops]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "object": datasets.ClassLabel(names=objects),
            "backdrop": datasets.ClassLabel(names=backdrops),
        }
    )
    plan = {
        "train": (seen, args.scenes_per_pair),
        "test": (seen, args.test_scenes_per_pair),
        "held_out": (held_out, args.test_scenes_per_pair),
    }

    datasets.disable_progress_bars()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        staging = aside / "new"  # `mkdtemp` makes a private folder; this one gets the user's usual permissions
        (staging / "data").mkdir(parents=True)
        counts = {}
        for split, (split_pairs, num_scenes) in plan.items():
            rows = list(draw_split(split, split_pairs, num_scenes, args.resolution, args.seed, font, args.num_proc))
            if split == "train":
                order = np.random.default_rng(args.seed).permutation(len(rows))
                rows = [rows[i] for i in order]
            counts[split] = len(rows)
            num_shards = max(1, math.ceil(len(rows) / ROWS_PER_SHARD))
            for shard in range(num_shards):
                images, texts, names, places = zip(*rows[shard::num_shards])
                columns = {
                    "image": [{"bytes": png, "path": None} for png in images],
                    "text": texts,
                    "object": [objects.index(name) for name in names],
                    "backdrop": [backdrops.index(place) for place in places],
                }
                table = datasets.Dataset.from_dict(columns, features=features)
                table.to_parquet(staging / "data" / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet")
            print(f"{split}: {len(rows)} scenes of {len(split_pairs)} pairs", flush=True)

        flags = ("resolution", "num_objects", "num_backdrops", "scenes_per_pair", "test_scenes_per_pair", "seed")
        sizes = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (math.inf, "100K<n<1M"))
        card = DATA_CARD.format(
            size_category=next(category for below, category in sizes if sum(counts.values()) < below),
            num_objects=len(objects),
            num_backdrops=len(backdrops),
            resolution=args.resolution,
            caption=captions(*held_out[0])[0],
            **counts,
            num_seen=len(seen),
            num_held_out=len(held_out),
            held_out_pairs=", ".join(" ".join(pair) for pair in held_out),
            objects=", ".join(objects),
            backdrops=", ".join(backdrops),
            command=" ".join(f"--{flag} {getattr(args, flag)}" for flag in flags),
            pillow_version=PIL.__version__,
            numpy_version=np.__version__,
            font_digest=hashlib.sha256(Path(font).read_bytes()).hexdigest()[:16],
        )
        (staging / "README.md").write_text(card, encoding="utf-8")

        if output_dir.exists():
            output_dir.rename(aside / "old")
        staging.rename(output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"Wrote {args.output_dir}: {', '.join(f'{split} {count}' for split, count in counts.items())}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def int_between(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `smallest` to `largest`, or without an upper limit."""

    def parse(text: str) -> int:
        value = int(text)
        if value < smallest or (largest is not None and value > largest):
            limit = f"at least {smallest}" if largest is None else f"from {smallest} to {largest}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    parse.__name__ = "int"  # argparse names the type when the text is no integer at all
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    text = "Build the emoji scenes, and measure a pipeline trained on them."
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    positive = int_between(1)

    text = "Draw the data set."
    sub = commands.add_parser("build", help=text, description=text, **style)
    sub.add_argument("--output_dir", default="data/emoji-scenes", help="folder to write; must not exist yet")
    sub.add_argument("--resolution", type=int_between(8), default=64, help="side of the images in pixels")
    sub.add_argument(
        "--num_objects",
        type=int_between(2, len(OBJECTS)),
        default=40,
        help=f"how many objects, from the start of the table of {len(OBJECTS)}",
    )
    sub.add_argument(
        "--num_backdrops",
        type=int_between(2, len(BACKDROPS)),
        default=6,
        help=f"how many backdrops, from the start of the table of {len(BACKDROPS)}",
    )
    sub.add_argument("--scenes_per_pair", type=positive, default=200, help="training scenes of each seen pair")
    sub.add_argument(
        "--test_scenes_per_pair", type=positive, default=10, help="test scenes of each seen and each held-out pair"
    )
    sub.add_argument(
        "--seed", type=int_between(0), default=0, help="seed of the scenes; the held-out pairs do not depend on it"
    )
    sub.add_argument("--num_proc", type=positive, default=1, help="worker processes; the pixels do not depend on it")
    sub.add_argument("--font", default=None, help="path of NotoColorEmoji.ttf; looked for where None")
    sub.add_argument("--overwrite", action="store_true", help="replace the data set at output_dir")
    sub.set_defaults(run=build)

    text = "Measure how often a pipeline's images show the object and the backdrop of their prompts."
    sub = commands.add_parser("evaluate", help=text, description=text, **style)
    sub.add_argument("--pipeline", default="pipelines/emoji-scenes", help="folder of a DraftAndRevisePipeline")
    sub.add_argument("--dataset", default="data/emoji-scenes", help="folder written by build")
    sub.add_argument(
        "--num_images", type=positive, default=500, help="at least so many images of seen, of held-out pairs"
    )
    sub.add_argument("--batch_size", type=positive, default=50, help="images sampled at once; each has its own seed")
    sub.add_argument("--seed", type=int_between(0), default=0, help="seed of the sampled images")
    own = "the pipeline's own where None"
    sub.add_argument("--num_inference_steps", type=positive, default=None, help=f"steps of the draft; {own}")
    sub.add_argument("--num_revise_steps", type=positive, default=None, help=f"steps of a revision; {own}")
    sub.add_argument("--num_revisions", type=int_between(0), default=None, help=f"revisions; {own}")
    sub.add_argument("--guidance_scale", type=float, default=None, help=f"guidance of the revisions; {own}")
    sub.add_argument("--temperature", type=float, default=None, help=f"temperature of the revisions; {own}")
    sub.add_argument(
        "--classifier",
        default=None,
        help="safetensors file of the classifier, trained first if missing; DATASET-classifier.safetensors where None",
    )
    sub.add_argument("--classifier_epochs", type=positive, default=3, help="epochs of the classifier's training")
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of all models")
    sub.add_argument("--output", default="results.json", help="JSON file of the results")
    sub.add_argument("--grid", default=None, help="image file for a contact sheet of eight prompts; none where None")
    sub.set_defaults(run=evaluate)
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> None:
    import emoji_evaluation  # which imports this module

    emoji_evaluation.evaluate(args)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        args.run(args)
    except (FontNotFoundError, FileExistsError) as error:
        print(f"emoji_scenes.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # SIGTERM cleans up as Ctrl-C does. SIGKILL leaves a hidden folder behind, beside `output_dir`, not in its place.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
