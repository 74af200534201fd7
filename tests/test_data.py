"""Training data: what is read, in which order, and what becomes of files that change and of rows that are broken."""

import io
import json
import math
import re
import tarfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from components import NUM_CLASSES, WORDS, tiny_tokenizer, tiny_vae
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rq_draft_revise import batches
from rq_draft_revise.batches import drawn_images, key_of, one_ahead, streamed_images
from rq_draft_revise.captions_and_labels import class_labels_of, input_ids_of
from rq_draft_revise.data import SkippedRows, digest_of_rows, load_split, split_names, undecoded, without_empty
from rq_draft_revise.decoded_images import (
    decode_all,
    decode_image,
    decode_value,
    decoded_rows,
    decoded_stream,
    to_pixel_values,
)
from rq_draft_revise.features import get_protocol
from rq_draft_revise.reading_order import streamed_rows, training_draws, training_order


NUM_IMAGES = 22


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after each epoch of a stream
        yield


FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


def rows_of(count: int, seed: int = 0) -> dict[str, list]:
    """Images of 8×8 pixels in random colours, with captions."""
    colors = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    images = [Image.fromarray(c.repeat(4, axis=0).repeat(4, axis=1)) for c in colors]
    return {"image": images, "text": [f"caption {i} of {seed}" for i in range(count)]}


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """`data`, a folder of parquet files: 22 images for training, 8 for testing."""
    folder = tmp_path_factory.mktemp("problem")
    (folder / "data").mkdir()
    for split, count in (("train", NUM_IMAGES), ("test", 8)):
        rows = datasets.Dataset.from_dict(rows_of(count), features=FEATURES)
        rows.to_parquet(folder / "data" / f"{split}-00000.parquet")
    return folder


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("num_images", [1, 2, 7, 64])
def test_every_epoch_reads_every_image_once_in_an_order_of_its_own(num_images):
    indices, _ = next(training_order(num_images, 0, 5 * num_images, 0, 1, seed=3))
    epochs = indices.view(5, num_images)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_images).expand(5, -1))
    if num_images == 64:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
        other, _ = next(training_order(num_images, 0, 5 * num_images, 0, 1, seed=4))
        assert not torch.equal(indices, other)


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 20),
    start=st.integers(0, 50),
    batch_size=st.integers(1, 7),
    num_processes=st.integers(1, 4),
    seed=st.integers(0, 2),
)
def test_the_order_is_the_same_however_it_is_split_and_wherever_it_resumes(
    num_images, start, batch_size, num_processes, seed
):
    end = start + 3 * num_processes * batch_size
    whole = next(training_order(num_images, 0, end, 0, 1, seed))
    shares = [training_order(num_images, start, batch_size, p, num_processes, seed) for p in range(num_processes)]
    micro_batches = [next(share) for _ in range(3) for share in shares]  # a micro-batch of each process, then the next
    for expected, parts in zip(whole, zip(*micro_batches)):
        assert torch.equal(torch.cat(parts), expected[start:end])


def test_every_epoch_mirrors_another_half_of_the_images():
    indices, flips = next(training_order(2000, 0, 4000, 0, 1, seed=0))
    by_image = torch.stack([flips[:2000][indices[:2000].argsort()], flips[2000:][indices[2000:].argsort()]])
    assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert abs((by_image[0] == by_image[1]).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize(
    "name, value",
    [("num_images", 0), ("start", -1), ("batch_size", 0), ("process_index", 2), ("process_index", -1), ("seed", -1)],
)
def test_an_impossible_order_is_refused_by_name(name, value):
    arguments = dict(num_images=5, start=0, batch_size=2, process_index=0, num_processes=2, seed=0)
    with pytest.raises(ValueError, match=f"`{name}`.*got {value}"):
        next(training_order(**{**arguments, name: value}))


# ------------------------------------------------------------------------------------------------------------ the data


def test_pixels_span_minus_one_to_one_and_only_flipped_images_are_mirrored():
    images = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    plain = to_pixel_values(images)
    assert plain.dtype == torch.float32 and plain.min() == -1 and plain.max() == 1
    some = to_pixel_values(images, torch.tensor([False, True, False]))
    assert torch.equal(some[1], plain[1].flip(-1))
    assert torch.equal(some[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (24, 8), (9, 31), (5, 4)])
def test_an_image_of_any_mode_and_shape_becomes_a_square_of_colours(mode, size):
    decoded = decode_image(Image.new("RGB", size, (102, 102, 102)).convert(mode), 8)
    assert decoded.shape == (3, 8, 8) and decoded.dtype == torch.uint8
    assert (decoded == 102).all()  # a grey that the web palette has


def test_images_of_other_sizes_are_those_of_the_evaluation():
    """Samples are compared with a reference that was resized alike, and a converted RQ-VAE was trained so."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(decode_image(image, 16), get_protocol("rq-vae").prepare(image, 16))


def test_the_next_item_is_made_while_one_is_used_and_an_error_comes_in_its_turn():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise OSError("gone")

    stream = one_ahead(items())
    assert next(stream) == 0
    for _ in range(100):
        if made == [0, 1]:
            break
        time.sleep(0.01)
    assert made == [0, 1]
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(stream)
    stream.close()


def test_what_is_cropped_is_the_center():
    image = Image.new("RGB", (24, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert torch.equal(decode_image(image, 8), blue)
    assert torch.equal(decode_image(image.transpose(Image.Transpose.TRANSPOSE), 8), blue)


def test_sixteen_bits_are_scaled_not_clipped():
    levels = torch.arange(64, dtype=torch.uint8).view(8, 8)
    image = Image.fromarray(levels.numpy().astype("uint16") * 257)
    assert torch.equal(decode_image(image, 8), levels.expand(3, 8, 8))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_decoding_as_needed_gives_what_decoding_ahead_gives_and_draws_nothing(problem, num_workers):
    dataset = load_split("train", dataset_name=str(problem / "data"))
    images = decode_all(dataset, "image", 8)
    batches = [[3, 1, 4], [1, 5], [9]]
    state = torch.get_rng_state()
    decoded = list(decoded_rows(dataset, iter(batches), "image", 8, torch.device("cpu"), num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(decoded) == len(batches)
    for (batch, rows), indices in zip(decoded, batches):
        assert rows.tolist() == indices and torch.equal(batch, images[indices])


def test_every_source_gives_the_same_images_and_captions(problem, tmp_path):
    dataset = load_split("train", caption_column="text", dataset_name=str(problem / "data"))
    expected = decode_all(dataset, "image", 8)
    assert len(dataset) == NUM_IMAGES and expected.float().std() > 50

    rows = []
    for i, row in enumerate(dataset):
        row["image"].save(tmp_path / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "text": row["text"]})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "files").mkdir()
    paths = [{"image": str(tmp_path / row["file_name"]), "text": row["text"]} for row in rows]
    (tmp_path / "files" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in paths))
    sources = [
        {"train_data_dir": str(tmp_path)},
        {"data_files": [str(problem / "data" / "train-00000.parquet")], "train_split": "learn"},
        {"data_files": [str(tmp_path / "files" / "rows.jsonl")], "train_split": "learn"},
    ]
    for source in sources:
        other = load_split(source.get("train_split", "train"), caption_column="text", **source)
        assert torch.equal(decode_all(other, "image", 8), expected), source
        assert other["text"][:] == dataset["text"][:]
    assert len(load_split("train[:10]", dataset_name=str(problem / "data"))) == 10


@pytest.mark.parametrize("reason", [ConnectionError("offline"), DatasetNotFoundError("gated")])
def test_a_data_set_that_cannot_be_reached_says_how_to_go_on(monkeypatch, reason):
    def unreachable(*arguments, **options):
        raise reason

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=f"hf auth login.*somebody/images.*{reason}.*train_data_dir"):
        load_split("train", dataset_name="somebody/images")


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("image_column", {"image_column": "picture"}),
        ("caption_column", {"caption_column": "title"}),
        ("data_files", {"dataset_name": None, "data_files": ["images.zip"]}),
        ("data_files", {"dataset_name": None, "data_files": ["a.csv", "b.json"]}),
        ("dataset_name", {"dataset_name": None}),
        ("`split` must be of ['train', 'test'], got 'valid' of", {"split": "valid"}),
        ("`test_split` must be of ['train', 'test'], got 'x' of", {"split": "x", "split_argument": "test_split"}),
        ("`split` must be of ['train', 'test'], got 'valid' of", {"split": "valid", "streaming": True}),
        ("`split` must have rows, got 'train[:0]' of", {"split": "train[:0]"}),
        (
            "`train_data_dir` must be a folder of images, got 'nowhere': there is no such folder.",
            {"dataset_name": None, "train_data_dir": "nowhere"},
        ),
        ("`train_data_dir` must be a folder of images, got '.': ", {"dataset_name": None, "train_data_dir": "."}),
        ("`dataset_name` must be a local folder", {"dataset_name": "."}),
        ("`data_files` must be files that there are", {"dataset_name": None, "data_files": ["no.csv"]}),
    ],
)
def test_data_that_cannot_be_had_are_refused_by_name(name, arguments, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_split(**{"split": "train", "dataset_name": str(problem / "data"), **arguments})


# ------------------------------------------------------------------------------------------------ files that change


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""


@pytest.mark.parametrize("source", ["folder with a card", "folder", "files", "image folder"])
def test_files_that_were_rebuilt_under_the_same_name_are_read_anew(source, tmp_path):
    folder = tmp_path / source
    (folder / "data").mkdir(parents=True)
    if source == "folder with a card":
        (folder / "README.md").write_text(CARD)

    def build(seed: int):
        rows = rows_of(5, seed)
        if source == "image folder":
            for i, image in enumerate(rows["image"]):
                image.save(folder / f"{i}.png")
            lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(rows["text"])]
            (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        else:
            path = folder / "data" / "train-00000.parquet"
            datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(path)

    def load():
        if source == "files":
            return load_split("train", data_files=[str(folder / "data" / "*.parquet")])
        return load_split("train", **{"train_data_dir" if source == "image folder" else "dataset_name": str(folder)})

    build(1)
    before = load()
    again = load()
    assert before["text"][:] == [f"caption {i} of 1" for i in range(5)]
    images = decode_all(before, "image", 8)
    # What others cache by the fingerprint (codes, for one) stays valid as long as the files do.
    assert again._fingerprint == before._fingerprint
    build(2)
    after = load()
    assert after["text"][:] == [f"caption {i} of 2" for i in range(5)]
    assert not torch.equal(decode_all(after, "image", 8), images)
    assert after._fingerprint != before._fingerprint


def test_two_folders_of_one_name_are_two_data_sets(tmp_path):
    for seed in (1, 2):
        folder = tmp_path / str(seed) / "scenes"
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text(CARD)
        rows = datasets.Dataset.from_dict(rows_of(3, seed), features=FEATURES)
        rows.to_parquet(folder / "data" / "train-00000.parquet")
    captions = [load_split("train", dataset_name=str(tmp_path / seed / "scenes"))["text"][:] for seed in "12"]
    assert captions == [[f"caption {i} of {seed}" for i in range(3)] for seed in (1, 2)]


# ------------------------------------------------------------------------------------------------ rows that are broken


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Nine rows, of which the images 2, 3 and 8 cannot be read and the captions 0 and 5 are empty."""
    rows = rows_of(9)
    images = [png_of(image) for image in rows["image"]]
    images[2], images[3], images[8] = b"no image at all", images[3][:40], b""
    table = {
        "image": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)],
        "text": [None if i == 0 else "  " if i == 5 else text for i, text in enumerate(rows["text"])],
        "score": [0.1 * i if i != 4 else None for i in range(9)],
        "json": [{"width": 10 * i} for i in range(9)],
    }
    path = tmp_path_factory.mktemp("broken") / "rows.parquet"
    features = FEATURES | {"score": datasets.Value("float64"), "json": {"width": datasets.Value("int64")}}
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(path)
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_next_readable_image_stands_in_and_the_broken_are_counted_and_named(broken, num_workers, capsys):
    dataset = load_split("train", data_files=[str(broken)])
    skipped = SkippedRows("nine rows")
    batches = [[0, 1, 2], [3, 8, 8]]
    device = torch.device("cpu")
    decoded = list(decoded_rows(dataset, batches, "image", 8, device, num_workers, skipped))
    assert [rows.tolist() for _, rows in decoded] == [[0, 1, 4], [4, 0, 0]]  # after the last comes the first
    whole = decode_all(dataset, "image", 8)
    assert torch.equal(decoded[1][0], whole[[3, 8, 8]]) and torch.equal(whole[3], whole[4])
    assert torch.equal(decode_all(dataset, "image", 8, stand_in=False), whole[[0, 1, 4, 5, 6, 7]])
    assert len(skipped) == 3 and str(skipped) == "3 with an unreadable image"
    printed = capsys.readouterr().out
    for name in ("2.png", "3.png", "8.png"):
        assert f"({name}:" in printed
    assert "nine rows" in printed


def test_a_data_set_without_a_readable_image_is_refused(tmp_path):
    table = {"image": [{"bytes": b"nothing", "path": None}] * 2, "text": ["a", "b"]}
    datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="no readable image"):
        decode_all(load_split("train", data_files=[str(tmp_path / "rows.parquet")]), "image", 8)


def test_rows_without_a_caption_are_left_out_and_counted(broken):
    skipped = SkippedRows("nine rows")
    dataset = without_empty(load_split("train", data_files=[str(broken)]), "text", skipped)
    assert dataset["text"][:] == [f"caption {i} of 0" for i in (1, 2, 3, 4, 6, 7, 8)]
    assert str(skipped) == "2 with an empty 'text'"
    with pytest.raises(ValueError, match="'text'"):
        without_empty(dataset.map(lambda row: {"text": " "}), "text", SkippedRows())


@pytest.mark.parametrize("label", [-1, NUM_CLASSES, None, 1.0, "cat"])  # the second is the null class
def test_labels_are_classes(label):
    assert class_labels_of([0, NUM_CLASSES - 1], NUM_CLASSES).tolist() == [0, NUM_CLASSES - 1]
    with pytest.raises(ValueError, match=rf"--label_column .* in \[0, {NUM_CLASSES - 1}\], .* got {label!r}"):
        class_labels_of([0, label], NUM_CLASSES)


def test_labels_matched_by_name_are_those_of_the_data():
    """Of two classes in the data, the transformer's last and first."""
    assert class_labels_of([0, 1, 0], NUM_CLASSES, [NUM_CLASSES - 1, 0]).tolist() == [
        NUM_CLASSES - 1,
        0,
        NUM_CLASSES - 1,
    ]
    with pytest.raises(ValueError, match=r"--label_column .* in \[0, 1\], .* got 2"):
        class_labels_of([0, 2], NUM_CLASSES, [NUM_CLASSES - 1, 0])


def test_captions_are_texts_of_tokens_that_the_transformer_has():
    ids = input_ids_of(["a cat", "the volcano at night in the snow"], tiny_tokenizer(), 6, len(WORDS))
    assert ids.tolist() == [[2, 5, 0, 0, 0, 0], [12, 13, 4, 8, 7, 12]]
    for caption in (None, 7):
        with pytest.raises(ValueError, match=f"--caption_column must hold texts, got {caption}"):
            input_ids_of(["a cat", caption], tiny_tokenizer(), 6, len(WORDS))
    with pytest.raises(ValueError, match=r"`tokenizer` must have tokens in \[0, 12\], .* got 13"):
        input_ids_of(["a cat", "a volcano"], tiny_tokenizer(), 6, len(WORDS) - 1)


@pytest.mark.parametrize(
    "column, bounds, expected",
    [
        ("score", {"filter_min": 0.55}, [6, 7, 8]),
        ("score", {"filter_max": 0.1}, [0, 1]),
        ("json.width", {"filter_min": 20, "filter_max": 40}, [2, 3, 4]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_filter_keeps_what_lies_within_its_bounds(broken, column, bounds, expected, streaming):
    # Two of the images cannot be read: filtering a stream decodes none.
    dataset = load_split("train", data_files=[str(broken)], filter_column=column, streaming=streaming, **bounds)
    rows = list(undecoded(dataset, "image"))
    assert [row["image"]["path"] for row in rows] == [f"{i}.png" for i in expected]


def test_a_filter_that_leaves_nothing_or_has_no_bound_is_refused(broken):
    with pytest.raises(ValueError, match="`filter_column` 'score'.*none of 9"):
        load_split("train", data_files=[str(broken)], filter_column="score", filter_min=2.0)
    with pytest.raises(ValueError, match="`filter_min`"):
        load_split("train", data_files=[str(broken)], filter_column="score")
    with pytest.raises(ValueError, match="`filter_column`.*'size'"):
        load_split("train", data_files=[str(broken)], filter_column="size", filter_min=2.0)


# ----------------------------------------------------------------------------------------------------------- crops


def test_random_crops_are_squares_of_the_image_at_every_place():
    width = 24
    image = Image.fromarray(np.arange(width, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
    lefts = [int(decode_image(image, 8, crop=(u, 0.5))[0, 0, 0]) for u in np.linspace(0, 1, 200, endpoint=False)]
    assert sorted(set(lefts)) == list(range(width - 8 + 1))
    assert int(decode_image(image, 8, crop=(1.0, 1.0))[0, 0, 0]) == width - 8
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    assert int(decode_image(tall, 8, crop=(0.0, 0.0))[0, 0, 0]) == 0


def test_an_image_is_flipped_every_second_time_and_cropped_at_its_own_two_numbers():
    _, draws = next(training_draws(1000, 0, 2000, 0, 1, seed=0))
    keys = [key_of(7, u, random_flip=True, random_crop=True) for u in draws]
    flips = sum(flip for _, flip, *_ in keys)
    assert abs(flips - 1000) < 5 * math.sqrt(2000 / 4)
    assert {key[0] for key in keys} == {7} and [key[2:] for key in keys] == [tuple(u) for u in draws[:, 1:].tolist()]
    assert key_of(7, draws[0], random_flip=False, random_crop=False) == (7, False)


def test_the_same_image_is_encoded_with_other_random_numbers_each_time(monkeypatch):
    vae, pixels = tiny_vae(), torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    draws = [torch.full((2, 3), u, dtype=torch.float64) for u in (0.1, 0.2, 0.1)]
    seen = [(pixels, torch.arange(2), u) for u in draws]
    monkeypatch.setattr(batches, "drawn_images", lambda dataset, **images: seen)
    first, other, again = (batch.codes for batch in batches.image_batches(None, None, vae, tau=2.0))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_epoch_draws_new_views_and_crops_uniformly():
    _, draws = next(training_draws(1000, 0, 2000, 0, 1, seed=0))
    assert draws.shape == (2000, 3) and draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 4 / math.sqrt(12 * 2000)
    assert (draws[:1000] != draws[1000:]).all()
    assert np.abs(np.corrcoef(draws.T.numpy()) - np.eye(3)).max() < 4 / math.sqrt(2000)


@pytest.mark.parametrize("num_processes, batch_size", [(1, 8), (2, 4), (4, 2)])
def test_the_same_crops_however_the_images_are_split_into_processes(num_processes, batch_size):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (NUM_IMAGES, 8, 20, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels]}, features=features)

    def batches(process_index, num_processes, batch_size):
        accelerator = SimpleNamespace(
            process_index=process_index, num_processes=num_processes, device=torch.device("cpu")
        )
        drawn = drawn_images(dataset, "image", 8, 8, batch_size, 3, accelerator, random_flip=True, random_crop=True)
        return [images for images, _, _ in islice(drawn, 5)]

    expected = torch.cat(batches(0, 1, 8))
    shares = [batches(process, num_processes, batch_size) for process in range(num_processes)]
    assert torch.equal(torch.cat([batch for together in zip(*shares) for batch in together]), expected)


# --------------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Webdataset tars as CC-3M's: four files of six samples with jpg, txt and json."""
    folder = tmp_path_factory.mktemp("tars")
    random = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"scenes-train-{shard:04d}.tar", "w") as tar:
            for i in range(6):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
                files = {"jpg": buffer.getvalue(), "txt": f"caption {6 * shard + i}".encode(),
                         "json": json.dumps({"width": 8 + i}).encode()}  # fmt: skip
                for extension, data in files.items():
                    entry = tarfile.TarInfo(f"{6 * shard + i:09d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def test_a_webdataset_is_read_as_a_whole_and_as_a_stream(tars):
    source = dict(image_column="jpg", caption_column="txt", data_files=[str(tars / "scenes-train-*.tar")])
    whole = load_split("train", **source)
    stream = load_split("train", streaming=True, **source)
    assert whole["txt"][:] == [f"caption {i}" for i in range(24)] == [row["txt"] for row in stream]
    assert decode_all(whole, "jpg", 8).float().std() > 30
    filtered = load_split("train", filter_column="json.width", filter_min=12, **source)
    assert filtered["txt"][:] == [f"caption {i}" for i in range(24) if i % 6 >= 4]
    assert split_names(data_files=source["data_files"]) == ["train"]


def places_and_keys(stream, count: int) -> list[tuple]:
    return [(place, row["__key__"]) for row, place in islice(stream, count)]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_stream_of_nothing_but_broken_images_ends_with_a_message(num_threads):
    rows = (({"image": None}, (epoch, row + 1)) for epoch in range(9) for row in range(5))
    decode = lambda row, place: decode_value(row["image"], 8)  # noqa: E731
    with pytest.raises(ValueError, match="none but an unreadable image in all of epoch 1"):
        next(decoded_stream(rows, decode, num_threads, "an unreadable image", SkippedRows()))


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])  # threads are 8 rows each ahead
def test_a_stream_that_ends_gives_every_readable_row_in_order(num_threads):
    rows = [({"number": i, "image": None if i in (3, 18) else rows_of(1)["image"][0]}, (0, i + 1)) for i in range(20)]

    def decode(row, place):
        return decode_image(row["image"], 8) if row["image"] else decode_value(None, 8)

    skipped = SkippedRows()
    decoded = list(decoded_stream(iter(rows), decode, num_threads, "an unreadable image", skipped))
    numbers = [i for i in range(20) if i not in (3, 18)]
    assert [(row["number"], place) for row, _, place in decoded] == [(i, (0, i + 1)) for i in numbers]
    assert str(skipped) == "2 with an unreadable image"


def test_a_streamed_row_that_is_skipped_counts_once_however_many_epochs():
    """Without a key it has another name in each; a row of a webdataset has its own."""
    for key in ({}, {"__key__": "x"}):
        rows = [({"number": i, **key, **({"__key__": f"{i}"} if key else {})}, i) for i in range(6)]
        endless = ((row, (epoch, i + 1)) for epoch in range(5) for row, i in (rows[:: (-1) ** epoch]))

        def decode(row, place):
            return 1 / (row["number"] % 3) if row["number"] % 3 else decode_value(None, 8)

        skipped = SkippedRows()
        assert len(list(decoded_stream(endless, decode, 0, "an unreadable image", skipped))) == 5 * 4
        assert len(skipped) == len(skipped.rows["an unreadable image"]) == 2


def test_the_digest_of_data_is_of_what_they_hold_and_not_of_where_they_lie(broken, tmp_path):
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(broken.read_bytes())
    first, second = (load_split("train", data_files=[str(path)]) for path in (broken, copy))
    assert first._fingerprint != second._fingerprint
    digest = digest_of_rows(first, "image", first["text"][:])
    assert digest_of_rows(second, "image", second["text"][:]) == digest
    captions = ["another", *first["text"][1:]]
    changed = {
        "order": digest_of_rows(first.select(range(8, -1, -1)), "image", first["text"][:]),
        "caption": digest_of_rows(first, "image", captions),
        "count": digest_of_rows(first.select(range(8)), "image", first["text"][:]),
    }
    assert len({digest, *changed.values()}) == 4
    # Paths of images are read, and many rows are sampled, the last among them.
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for i in range(3):
            color = (i, 7 if name == "other" and i == 2 else 0, 0)
            Image.new("RGB", (8, 8), color).save(tmp_path / name / f"{i}.png")
    digests = [digest_of_rows(load_split("train", train_data_dir=str(tmp_path / n)), "image", num_rows=2)
               for n in ("one", "other", "one")]  # fmt: skip
    assert digests[0] == digests[2] != digests[1]


def test_a_stream_of_nothing_but_empty_captions_ends_with_a_message():
    rows = rows_of(5) | {"text": ["", None, " ", "", ""]}
    stream = datasets.Dataset.from_dict(rows, features=FEATURES).to_iterable_dataset()
    one_process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    images = dict(image_column="image", resolution=8, start=(0, 0), batch_size=2, seed=0, accelerator=one_process)
    skipped = SkippedRows()
    with pytest.raises(ValueError, match="none but an empty 'text' in all of epoch 1"):
        next(streamed_images(stream, skipped=skipped, condition_column="text", **images))
    assert "an empty 'text'" in str(skipped)


@pytest.mark.parametrize("num_processes", [1, 2, 3])  # of four files: all, two each, and every third row of all
def test_a_stream_reads_every_row_once_an_epoch_and_resumes_at_any_place(tars, num_processes):
    files = [str(tars / "scenes-train-*.tar")]
    dataset = undecoded(load_split("train", "jpg", data_files=files, streaming=True), "jpg")

    def stream(process, start=(0, 0)):
        return streamed_rows(dataset, 3, 5, process, num_processes, start)

    epochs = [[], []]
    for process in range(num_processes):
        rows = places_and_keys(stream(process), 2 * 24 // num_processes)
        for (epoch, _), key in rows:
            epochs[epoch].append(key)
        for resumed_at in (3, len(rows) - 2):
            assert places_and_keys(stream(process, rows[resumed_at - 1][0]), 2) == rows[resumed_at : resumed_at + 2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"{i:09d}" for i in range(24)]
    assert epochs[0] != epochs[1]
