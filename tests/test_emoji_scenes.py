"""Laws of the emoji scenes: what is drawn, what is held out, how it is written, and how images are scored."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "emoji_scenes.py"
if str(SCRIPT.parent) not in sys.path:
    sys.path.insert(0, str(SCRIPT.parent))

import emoji_evaluation  # noqa: E402
import emoji_scenes  # noqa: E402
from emoji_scenes import BACKDROPS, OBJECTS, captions, draw_scene, find_font, pairs  # noqa: E402

from rq_draft_revise.stages import sample_stages  # noqa: E402


try:
    find_font()
    FONT_IS_MISSING = False
except emoji_scenes.FontNotFoundError:
    FONT_IS_MISSING = True
needs_font = pytest.mark.skipif(FONT_IS_MISSING, reason="draws with fonts-noto-color-emoji")

TINY = ["--resolution", "16", "--num_objects", "6", "--num_backdrops", "3", "--test_scenes_per_pair", "2"]


def build_argv(output_dir: Path, *more: str) -> list[str]:
    return ["build", "--output_dir", str(output_dir), *TINY, "--scenes_per_pair", "3", *more]


def load(folder: Path, cache: Path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder), cache_dir=str(cache))


def digests(scenes: datasets.DatasetDict) -> dict[str, list[str]]:
    """For each split its rows in order, the pixels as a digest."""
    return {
        name: [f"{row['text']} {hashlib.sha256(row['image'].tobytes()).hexdigest()}" for row in split]
        for name, split in scenes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("built") / "emoji"
    assert emoji_scenes.main(build_argv(output_dir)) == 0
    return output_dir


@pytest.fixture(scope="module")
def scenes(folder, tmp_path_factory):
    return load(folder, tmp_path_factory.mktemp("cache"))


# --- the tables --------------------------------------------------------------------------------------------------


def test_tables_are_large_enough_and_unambiguous():
    assert len(OBJECTS) >= 100
    assert len(OBJECTS) == len(emoji_scenes.GLYPHS) == len(set(emoji_scenes.GLYPHS))
    assert len(BACKDROPS) >= 6
    assert list(BACKDROPS)[:4] == ["at dusk", "in the snow", "at night", "on the grass"]
    assert {"volcano", "cat", "robot face"} <= set(list(OBJECTS)[:40])


def test_captions_have_the_right_article_and_at_most_twelve_words():
    assert captions("volcano", "at dusk") == [
        "a volcano at dusk",
        "volcano at dusk",
        "at dusk, a volcano",
        "a picture of a volcano at dusk",
    ]
    assert captions("elephant", "at night")[0] == "an elephant at night"
    assert captions("unicorn", "at night")[0] == "a unicorn at night"
    for thing in OBJECTS:
        for backdrop in BACKDROPS:
            assert len(set(captions(thing, backdrop))) == 4
            assert all(len(caption.split()) <= 12 for caption in captions(thing, backdrop))


@pytest.mark.parametrize("num_objects, num_backdrops", [(2, 2), (6, 3), (40, 4), (39, 5), (95, 6), (115, 8)])
def test_held_out_pairs_are_a_balanced_tenth(num_objects, num_backdrops):
    seen, held_out = pairs(num_objects, num_backdrops)
    assert ("volcano", "at dusk") in held_out
    assert not set(seen) & set(held_out)
    assert len(set(seen) | set(held_out)) == len(seen) + len(held_out) == num_objects * num_backdrops
    assert len(held_out) == max(1, round(0.1 * num_objects * num_backdrops))

    lacked_by_object = [sum(pair[0] == thing for pair in held_out) for thing in list(OBJECTS)[:num_objects]]
    lacked_by_backdrop = [sum(pair[1] == place for pair in held_out) for place in list(BACKDROPS)[:num_backdrops]]
    assert max(lacked_by_object) <= 1
    assert max(lacked_by_backdrop) - min(lacked_by_backdrop) <= 1
    assert pairs(num_objects, num_backdrops) == (seen, held_out)


def test_pairs_refuses_what_the_tables_do_not_hold():
    with pytest.raises(ValueError, match="`num_objects` must be from 2 to"):
        pairs(len(OBJECTS) + 1, 4)
    with pytest.raises(ValueError, match="`num_backdrops` must be from 2 to"):
        pairs(40, 1)


# --- drawing -----------------------------------------------------------------------------------------------------


@needs_font
def test_a_scene_is_a_function_of_its_generator():
    first, again, other = (draw_scene("cat", "at night", 64, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (first.size, first.mode) == ((64, 64), "RGB")
    assert first.tobytes() == again.tobytes() != other.tobytes()


@needs_font
def test_the_font_draws_every_object_and_no_two_alike():
    glyphs = {emoji_scenes.draw_glyph(thing, find_font()).tobytes() for thing in OBJECTS}
    assert len(glyphs) == len(OBJECTS)


def test_backdrops_of_one_kind_are_closer_than_backdrops_of_two():
    """By mean colour of the upper and of the lower half, over eight drawings of each."""

    def halves(backdrop: str, seed: int) -> np.ndarray:
        canvas = BACKDROPS[backdrop](32, np.random.default_rng(seed)).clip(0, 255)
        return np.concatenate([canvas[:16].mean(axis=(0, 1)), canvas[16:].mean(axis=(0, 1))])

    kinds = {backdrop: np.stack([halves(backdrop, seed) for seed in range(8)]) for backdrop in BACKDROPS}
    for backdrop, drawings in kinds.items():
        center = drawings.mean(axis=0)
        within = np.linalg.norm(drawings - center, axis=1).max()
        between = min(np.linalg.norm(kinds[other] - center, axis=1).min() for other in kinds if other != backdrop)
        assert between > within, backdrop


# --- build -------------------------------------------------------------------------------------------------------


@needs_font
def test_splits_hold_the_pairs_they_should(scenes):
    seen, held_out = pairs(6, 3)
    objects, backdrops = scenes["train"].features["object"].names, scenes["train"].features["backdrop"].names
    found = {
        name: {(objects[thing], backdrops[place]) for thing, place in zip(split["object"], split["backdrop"])}
        for name, split in scenes.items()
    }
    assert found == {"train": set(seen), "test": set(seen), "held_out": set(held_out)}
    assert {thing for thing, _ in found["train"]} == set(list(OBJECTS)[:6])
    assert {place for _, place in found["train"]} == set(list(BACKDROPS)[:3])
    assert {name: len(split) for name, split in scenes.items()} == {
        "train": 3 * len(seen),
        "test": 2 * len(seen),
        "held_out": 2 * len(held_out),
    }


@needs_font
def test_rows_are_typed_png_images_with_captions_of_their_labels(folder, scenes):
    features = scenes["train"].features
    assert isinstance(features["image"], datasets.Image)
    assert features["text"] == datasets.Value("string")
    assert features["object"] == datasets.ClassLabel(names=list(OBJECTS)[:6])
    assert features["backdrop"] == datasets.ClassLabel(names=list(BACKDROPS)[:3])
    for row in scenes["train"]:
        assert row["image"].size == (16, 16)
        names = features["object"].int2str(row["object"]), features["backdrop"].int2str(row["backdrop"])
        assert row["text"] in captions(*names)
    raw = scenes["test"].cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    assert Image.open(io.BytesIO(raw)).format == "PNG"
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        f"{split}-00000-of-00001.parquet" for split in ("held_out", "test", "train")
    ]


@needs_font
def test_train_rows_are_shuffled_and_no_scene_is_in_two_splits(scenes):
    objects = scenes["train"]["object"]
    assert list(objects) != sorted(objects)
    rows = [row.split()[-1] for split in digests(scenes).values() for row in split]
    assert len(set(rows)) == len(rows)


@needs_font
def test_equal_seeds_build_equal_scenes_whatever_the_number_of_workers(tmp_path, scenes):
    for name, more in (("workers", ["--num_proc", "2"]), ("seed", ["--seed", "1"])):
        assert emoji_scenes.main(build_argv(tmp_path / name, *more)) == 0
    assert digests(load(tmp_path / "workers", tmp_path / "cache")) == digests(scenes)
    others = digests(load(tmp_path / "seed", tmp_path / "cache"))
    assert all(set(others[split]).isdisjoint(rows) for split, rows in digests(scenes).items())


@needs_font
def test_data_card_declares_the_splits_and_how_to_build_again(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"path: data/{split}-*" in card for split in ("train", "test", "held_out"))
    assert "volcano at dusk" in card
    assert "--resolution 16 --num_objects 6 --num_backdrops 3 --scenes_per_pair 3" in card


@needs_font
def test_an_existing_output_is_refused_unless_overwritten(tmp_path, capsys):
    output_dir = tmp_path / "emoji"
    assert emoji_scenes.main(build_argv(output_dir)) == 0
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    assert emoji_scenes.main(build_argv(output_dir, "--seed", "1")) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before
    assert emoji_scenes.main(build_argv(output_dir, "--seed", "1", "--overwrite")) == 0
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} != before
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"]


@needs_font
def test_overwrite_leaves_foreign_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert emoji_scenes.main(build_argv(tmp_path, "--overwrite")) == 1
    assert "leaves it alone" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_missing_font_ends_with_one_line_that_says_what_to_install(tmp_path, capsys):
    argv = build_argv(tmp_path / "emoji", "--font", str(tmp_path / "none.ttf"))
    assert emoji_scenes.main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("Noto Color Emoji", "fonts-noto-color-emoji", "apt-get install -y fonts-noto-color-emoji", "--font"):
        assert part in error
    assert not list(tmp_path.iterdir())


@needs_font
def test_a_build_that_fails_on_its_way_leaves_nothing(tmp_path, monkeypatch):
    draw_pair = emoji_scenes.draw_pair

    def fail_in_the_last_split(pair, split, **arguments):
        if split == "held_out":
            raise KeyboardInterrupt
        return draw_pair(pair, split, **arguments)

    monkeypatch.setattr(emoji_scenes, "draw_pair", fail_in_the_last_split)
    with pytest.raises(KeyboardInterrupt):
        emoji_scenes.main(build_argv(tmp_path / "emoji"))
    assert not list(tmp_path.iterdir())


@needs_font
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_leaves_no_output(tmp_path, number):
    argv = [*build_argv(tmp_path / "emoji"), "--scenes_per_pair", "100000"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.iterdir()), "the build had not begun to write"
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "emoji").exists()
    if number == signal.SIGTERM:
        assert not list(tmp_path.iterdir())
    assert emoji_scenes.main(build_argv(tmp_path / "emoji")) == 0  # what a kill left behind is in nobody's way


# --- evaluate ----------------------------------------------------------------------------------------------------


class BrightnessClassifier(torch.nn.Module):
    """Reads object and backdrop off the first two channels of the first pixel: 0.1 means class 1, 0.2 class 2, ..."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        classes = (10 * images[:, :2, 0, 0]).round().long()
        objects, backdrops = torch.nn.functional.one_hot(classes, 10).float().unbind(dim=1)
        return objects + self.anchor, backdrops + self.anchor


def test_score_is_a_function_of_images_and_labels():
    objects, backdrops = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0])
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0], images[:, 1] = (labels.view(4, 1, 1) / 10 for labels in (objects, backdrops))
    images[3, 0], images[2, 1] = 0.9, 0.9  # one wrong object, one wrong backdrop, in two images
    for batch_size in (1, 3, 4):
        scores = emoji_evaluation.score(BrightnessClassifier(), images, objects, backdrops, batch_size=batch_size)
        assert {part: value["accuracy"] for part, value in scores.items()} == {
            "object": 0.75,
            "backdrop": 0.75,
            "both": 0.5,
        }
    assert scores["both"] == {"accuracy": 0.5, "standard_error": 0.25, "count": 4}


class CountingPipeline:
    """Stands in for a pipeline: its codes count the steps taken, and its pixels are its codes."""

    def __init__(self, resolution: int = 16):
        self.resolution = resolution
        self.prompts: list[str] = []
        self.first_draws: list[float] = []
        self.device, self.scheduler = torch.device("cpu"), SimpleNamespace(config=dict(SAMPLER))
        self.vae = SimpleNamespace(
            device=torch.device("cpu"),
            dtype=torch.float32,
            encode=lambda pixels: SimpleNamespace(codes=pixels),
            decode=lambda codes: SimpleNamespace(sample=codes),
        )

    def __call__(self, prompt, generator, output_type, callback_on_step_end, **arguments):
        assert output_type == "latent" and len(generator) == len(prompt)
        self.prompts += prompt
        self.first_draws += [torch.rand((), generator=one).item() for one in generator]
        codes = torch.zeros(len(prompt), 1, 1, 1, dtype=torch.int64)
        num_steps = arguments["num_inference_steps"] + arguments["num_revisions"] * arguments["num_revise_steps"]
        for step in range(num_steps):
            codes += 1  # in place, as a pipeline may: what the callback was given must be kept by copy
            callback_on_step_end(self, step, step, {"latents": codes})
        return SimpleNamespace(images=codes)

    def decode_latents(self, codes, output_type):
        assert output_type == "pt"
        return (codes / 100).expand(-1, 3, self.resolution, self.resolution)


SAMPLER = dict(num_inference_steps=5, num_revise_steps=2, num_revisions=3, guidance_scale=1.5, temperature=0.8)


def test_stages_are_the_codes_after_the_draft_and_after_each_revision():
    generators = [torch.Generator(), torch.Generator()]
    for sampler in (SAMPLER, {}, {"num_revisions": None}):  # given, or the scheduler's defaults
        stages, seconds = sample_stages(CountingPipeline(), generators, {"prompt": ["a", "b"]}, **sampler)
        assert [stage.flatten().tolist() for stage in stages] == [[5, 5], [7, 7], [9, 9], [11, 11]]
        assert all(stage.shape == (2, 1, 1, 1) for stage in stages)
        assert len(seconds) == 4 and seconds[0] > 0 and seconds == sorted(seconds)


def test_stages_of_a_pipeline_that_counts_otherwise_are_refused():
    class WithoutLastStep(CountingPipeline):
        def __call__(self, callback_on_step_end, **arguments):
            def skip_last(pipe, step, timestep, callback_kwargs):
                return callback_on_step_end(pipe, step, timestep, callback_kwargs) if step < 10 else {}

            return super().__call__(callback_on_step_end=skip_last, **arguments)

    with pytest.raises(RuntimeError, match="Steps"):
        sample_stages(WithoutLastStep(), [torch.Generator()], {"prompt": ["a"]}, **SAMPLER)


@needs_font
def test_evaluation_repeats_pairs_evenly_and_does_not_depend_on_the_batch_size(scenes):
    classifier = emoji_evaluation.SceneClassifier(6, 3, width=4).eval()
    runs = []
    for batch_size in (7, 50):
        pipe = CountingPipeline()
        scores, seconds, first_images = emoji_evaluation.evaluate_pipeline(
            pipe, scenes, classifier, num_images=20, batch_size=batch_size, seed=0, sampler=SAMPLER
        )
        runs.append((scores, pipe.prompts, pipe.first_draws))
    assert runs[0] == runs[1]

    seen, held_out = pairs(6, 3)
    expected = {captions(*pair)[0]: 2 for pair in seen} | {captions(*pair)[0]: 10 for pair in held_out}
    assert {prompt: pipe.prompts.count(prompt) for prompt in pipe.prompts} == expected
    assert len(set(pipe.first_draws)) == len(pipe.prompts)  # no two images share their noise
    stages = ["draft", "after revision 1", "after revision 2", "after revision 3"]
    for group in ("seen", "held_out"):
        assert list(scores[group]) == ["real scenes", "RQ-VAE reconstructions", *stages]
        assert scores[group]["draft"]["object"]["count"] >= 20
        # This RQ-VAE gives back what it is given, so its reconstructions score as the real scenes do.
        assert scores[group]["RQ-VAE reconstructions"] == scores[group]["real scenes"]
    assert len(emoji_evaluation.markdown_table(scores).splitlines()) == 2 + 6
    json.dumps(scores)

    columns = emoji_evaluation.grid_columns(scenes, first_images)
    assert columns[0][0] == "a volcano at dusk"
    assert [len(images) for _, images in columns] == [4] * len(columns)
    assert emoji_evaluation.draw_grid(columns).height > 4 * 128


@needs_font
def test_evaluation_refuses_images_of_another_size(scenes):
    classifier = emoji_evaluation.SceneClassifier(6, 3, width=4).eval()
    with pytest.raises(ValueError, match="data set it was trained on"):
        emoji_evaluation.evaluate_pipeline(CountingPipeline(32), scenes, classifier, 4, 4, 0, SAMPLER)


@needs_font
def test_classifier_is_trained_once_and_refused_for_other_data(tmp_path, scenes, monkeypatch):
    path = tmp_path / "classifier.safetensors"
    classifier, record = emoji_evaluation.load_or_train_classifier(path, scenes["train"], num_epochs=1)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    monkeypatch.setattr(emoji_evaluation, "train_classifier", None)
    again, same_record = emoji_evaluation.load_or_train_classifier(path, scenes["train"], num_epochs=1)
    assert record == same_record
    images = torch.rand(2, 3, 16, 16)
    assert all(torch.equal(one, other) for one, other in zip(classifier(images), again(images)))
    with pytest.raises(ValueError, match="num_train_scenes"):
        emoji_evaluation.load_or_train_classifier(path, scenes["train"].select(range(5)), num_epochs=1)


@needs_font
@pytest.mark.slow
def test_classifier_learns_objects_also_before_backdrops_it_has_not_seen_them_with():
    """Of four objects and three backdrops *volcano at dusk* is held out: its object must still come out a volcano."""
    seen, held_out = pairs(4, 3)
    things, places = list(OBJECTS), list(BACKDROPS)

    def draw(some_pairs, count, seed):
        rows = [(pair, np.random.default_rng([seed, i, k])) for i, pair in enumerate(some_pairs) for k in range(count)]
        images = np.stack([np.asarray(draw_scene(*pair, 32, rng)) for pair, rng in rows])
        labels = [torch.tensor([table.index(pair[i]) for pair, _ in rows]) for i, table in enumerate((things, places))]
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), *labels

    classifier = emoji_evaluation.train_classifier(*draw(seen, 60, seed=0), 4, 3, num_epochs=6, batch_size=32)
    for some_pairs in (seen, held_out):
        scores = emoji_evaluation.score(classifier, *draw(some_pairs, 20, seed=1))
        assert scores["both"]["accuracy"] > 0.8, some_pairs
