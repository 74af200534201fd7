"""A data set of codes: the same codes as encoding on the way, whatever the interruptions, and only of one RQ-VAE."""

import json
import re
import shutil
from pathlib import Path

import datasets
import encode_dataset
import numpy as np
import pytest
import torch
import train_cc3m
from accelerate.state import AcceleratorState, GradientState
from components import tiny_pipeline
from PIL import Image

from rq_draft_revise import RQVAEModel
from rq_draft_revise.code_cache import codes_in_dataset, codes_in_memory, digest_of, encode, encoded_rows
from rq_draft_revise.data import load_split
from rq_draft_revise.decoded_images import decode_all, decode_image, to_pixel_values


NUM_IMAGES = 11
CAPTIONS = ["a cat at dusk", "an owl in the snow", " ", "the volcano"]  # the third is empty


pytestmark = pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """`data`, images of 12×8 pixels in three parquet files, of which the seventh cannot be read; `pipeline`."""
    folder = tmp_path_factory.mktemp("problem")
    (folder / "data").mkdir()
    random = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    images = [Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in range(NUM_IMAGES)]
    rows = {"image": images, "text": [CAPTIONS[i % 4] for i in range(NUM_IMAGES)],
            "label": [i % 2 for i in range(NUM_IMAGES)]}  # fmt: skip
    rows["image"][6] = {"bytes": b"damaged", "path": "six.png"}
    whole = datasets.Dataset.from_dict(rows, features=features)
    for k in range(3):
        whole.shard(3, k, contiguous=True).to_parquet(folder / "data" / f"train-{k:05d}-of-00003.parquet")
    tiny_pipeline("text").save_pretrained(folder / "pipeline")
    return folder


READABLE = [i for i in range(NUM_IMAGES) if i % 4 != 2]  # six, the damaged one, has an empty caption too


def run(problem: Path, output_dir: Path, **flags) -> None:
    """Encode `problem`; flags of value True stand alone."""
    argv = []
    defaults = {"vae": problem / "pipeline" / "vae", "dataset_name": problem / "data", "output_dir": output_dir}
    for name, value in {**defaults, **flags}.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", *(str(value).split())]
    encode_dataset.main(encode_dataset.parse_args(argv))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def codes_of(folder: Path) -> np.ndarray:
    """`(rows, views, 4, 4, 3)`."""
    return np.asarray(load_split("train", dataset_name=str(folder)).with_format("numpy")["codes"][:])


@pytest.fixture(scope="module")
def vae(problem) -> RQVAEModel:
    return RQVAEModel.from_pretrained(problem / "pipeline" / "vae").eval()


@pytest.mark.parametrize("streaming", [False, True])
def test_codes_captions_and_labels_are_those_of_the_readable_rows(streaming, problem, vae, tmp_path, capsys):
    flags = {"streaming": True} if streaming else {"rows_per_file": 4}
    run(problem, tmp_path / "codes", caption_column="text", label_column="label", random_flip=True, **flags)
    dataset = load_split("train", dataset_name=str(tmp_path / "codes"))
    assert dataset["text"][:] == [CAPTIONS[i % 4] for i in READABLE]
    assert dataset["label"][:] == [i % 2 for i in READABLE]
    assert dataset.features["label"].names == ["a", "b"]
    assert set(dataset["vae"][:]) == {digest_of(vae)}
    pixels = to_pixel_values(decode_all(load_split("train", dataset_name=str(problem / "data")), "image", 8))[READABLE]
    expected = torch.stack([encode(vae, pixels), encode(vae, pixels.flip(-1))], dim=1)
    assert np.array_equal(codes_of(tmp_path / "codes"), expected.numpy())
    assert not torch.equal(expected[:, 0], expected[:, 1])
    assert capsys.readouterr().out.count("Skipped: an empty 'text'") == 3
    assert len(list((tmp_path / "codes" / "data").glob("train-*-of-00003.parquet"))) == 3


def test_an_unreadable_image_is_left_out_counted_and_named(problem, tmp_path, capsys):
    run(problem, tmp_path / "codes", label_column="label", rows_per_file=4)
    assert len(codes_of(tmp_path / "codes")) == NUM_IMAGES - 1
    printed = capsys.readouterr().out
    assert "row 6 (six.png: UnidentifiedImageError)" in printed
    assert "train-00001-of-00003.parquet: 3 rows, skipped: 1 with an unreadable image" in printed
    assert "10 rows of train" in printed


def test_draws_have_crops_and_codes_of_their_own_however_the_rows_are_cut_into_files(problem, vae, tmp_path):
    flags = dict(random_crop=True, num_draws=3, caption_column="text", seed=5)
    for rows_per_file in (2, 100):
        run(problem, tmp_path / f"{rows_per_file}", rows_per_file=rows_per_file, **flags)
    codes = codes_of(tmp_path / "2")
    assert np.array_equal(codes, codes_of(tmp_path / "100"))
    assert codes.shape == (len(READABLE), 3, 4, 4, 3)
    # Each draw is one of the five squares of 8×8 in 12×8, and not all are the same.
    row = load_split("train", dataset_name=str(problem / "data"))[READABLE[1]]
    squares = torch.stack([decode_image(row["image"], 8, crop=(left / 5 + 0.01, 0.0)) for left in range(5)])
    possible = encode(vae, to_pixel_values(squares)).numpy()
    chosen = [next(i for i in range(5) if np.array_equal(possible[i], draw)) for draw in codes[1]]
    assert len(set(chosen)) > 1

    run(problem, tmp_path / "drawn", tau=0.5, num_draws=2, caption_column="text")
    drawn = codes_of(tmp_path / "drawn")
    assert (drawn[:, 0] != drawn[:, 1]).mean() > 0.01


@pytest.mark.parametrize("flags", [{"random_crop": True}, {"tau": 2.0}], ids=["crops", "drawn codes"])
def test_a_row_of_each_file_of_a_stream_has_draws_of_its_own(flags, problem, tmp_path):
    """The same image in the same row of every file, so that only the draws can tell the codes apart."""
    (tmp_path / "data").mkdir()
    row = load_split("train", dataset_name=str(problem / "data")).select([0])
    for k in range(4):
        row.to_parquet(tmp_path / "data" / f"train-{k:05d}-of-00004.parquet")
    source = {"dataset_name": tmp_path / "data", "streaming": True, "num_draws": 4}
    for name in ("codes", "again"):
        run(problem, tmp_path / name, **source, **flags)
    codes = codes_of(tmp_path / "codes")
    assert codes.shape[:2] == (4, 4) and np.array_equal(codes, codes_of(tmp_path / "again"))
    assert len({draws.tobytes() for draws in codes}) > 1


def test_an_interrupted_run_goes_on_and_an_unfinished_one_is_not_read(problem, tmp_path, monkeypatch, capsys):
    run(problem, tmp_path / "whole", rows_per_file=4, caption_column="text")
    original, calls = encode_dataset.encode_part, []

    def killed_in_the_second(*args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode_dataset, "encode_part", killed_in_the_second)
        run(problem, tmp_path / "codes", rows_per_file=4, caption_column="text")
    with pytest.raises(ValueError, match="contain any data files"):
        load_split("train", dataset_name=str(tmp_path / "codes"))
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    run(problem, tmp_path / "codes", rows_per_file=4, caption_column="text")
    assert "train-00000-of-00003.parquet: encoded before" in capsys.readouterr().out
    assert np.array_equal(codes_of(tmp_path / "codes"), codes_of(tmp_path / "whole"))
    run(problem, tmp_path / "codes", rows_per_file=4, caption_column="text")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["seed", "vae", "data"])
def test_other_settings_are_refused_by_name(change, problem, tmp_path):
    shutil.copytree(problem / "data", tmp_path / "data")
    run(problem, tmp_path / "codes", dataset_name=tmp_path / "data", caption_column="text")
    flags = {}
    if change == "seed":
        flags["seed"] = 1
    elif change == "vae":
        other = RQVAEModel.from_pretrained(problem / "pipeline" / "vae")
        other.quant_conv.bias.data += 1
        other.save_pretrained(tmp_path / "vae")
        flags["vae"] = tmp_path / "vae"
    else:
        (tmp_path / "data" / "train-00000-of-00003.parquet").touch()
    with pytest.raises(ValueError, match={"data": "local_files"}.get(change, change)):
        run(problem, tmp_path / "codes", **{"dataset_name": tmp_path / "data", "caption_column": "text", **flags})


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_draws": 2}, "--num_draws must be 1"),
        ({"rows_per_file": 0}, "--rows_per_file.*got 0"),
        ({"tau": -1}, "--tau.*got -1"),
        ({"caption_column": "title"}, "caption_column.*'title'"),
        ({"resolution": 0}, "--resolution must be .* got 0"),
        ({"resolution": 7}, "--resolution must be a multiple of 2, got 7"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(flags, message, problem, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(problem, tmp_path / "codes", **flags)


@pytest.mark.parametrize("splits", [("train[:50%]", "train[50%:]"), ("train", "train"), ("train", "train[:5]")])
def test_splits_of_one_name_are_refused_before_anything_is_written(splits, problem, tmp_path):
    """Files go by the name: those of the second split would be taken for those of the first, encoded before."""
    both = f"{re.escape(repr(splits[0]))} and {re.escape(repr(splits[1]))}, both of 'train'"
    with pytest.raises(ValueError, match=f"--splits .* got {both}"):
        run(problem, tmp_path / "codes", splits=" ".join(splits))
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_training_on_codes_is_training_on_their_images(streaming, problem, tmp_path):
    """Without flips and crops the two are the same run, to the bit; a stream has an order of its own."""
    run(problem, tmp_path / "codes", caption_column="text", rows_per_file=4)
    argv = [
        "--pretrained_model_name_or_path", str(problem / "pipeline"), "--train_batch_size", "4",
        "--max_train_steps", "3", "--validation_split", "train[:4]", "--logging_steps", "1", "--mixed_precision", "no",
        "--num_validation_images", "0",
    ]  # fmt: skip
    if streaming:
        argv[7] = "none"
        argv.append("--streaming")
    logs = []
    for source in (problem / "data", tmp_path / "codes"):
        output_dir = tmp_path / f"output-{source.name}"
        flags = ["--dataset_name", str(source), "--output_dir", str(output_dir)]
        train_cc3m.main(train_cc3m.parse_args(argv + flags))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        lines = [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines if line["kind"] == "train"])
        logs[-1] += [line["image_loss"] for line in lines if line["kind"] == "validation" and line["split"] == "seen"]
    if streaming:
        assert len(logs[1]) == 3 and np.isfinite(logs[1]).all()
    else:
        assert len(logs[1]) == 4 and logs[0][:3] == logs[1][:3]


def test_codes_of_another_rqvae_are_refused(problem, tmp_path):
    run(problem, tmp_path / "codes", caption_column="text")
    other = RQVAEModel.from_pretrained(problem / "pipeline" / "vae")
    other.quant_conv.bias.data += 1
    other.save_pretrained(tmp_path / "vae")
    argv = [
        "--pretrained_model_name_or_path", str(problem / "pipeline"), "--vae", str(tmp_path / "vae"),
        "--dataset_name", str(tmp_path / "codes"), "--max_train_steps", "1", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'codes'.*--vae"):
        train_cc3m.main(train_cc3m.parse_args(argv))


def test_stored_codes_are_read_by_row_and_view(problem, vae, tmp_path):
    run(problem, tmp_path / "codes", random_flip=True, caption_column="text")
    dataset = load_split("train", dataset_name=str(tmp_path / "codes"))
    codes = torch.from_numpy(codes_of(tmp_path / "codes"))
    rows, u = torch.tensor([3, 0, 3, 1]), torch.tensor([0.0, 0.49, 0.5, 0.999], dtype=torch.float64)
    expected = codes[rows, [0, 0, 1, 1]]
    for read in (codes_in_dataset(dataset), codes_in_memory(codes.to(torch.uint16))):
        assert torch.equal(read(rows, u), expected) and read(rows, u).dtype == torch.int64


def test_batches_of_any_size_give_the_same_codes(problem, vae):
    dataset = load_split("train", dataset_name=str(problem / "data"))
    results = []
    for batch_size in (1, 3, 100):
        encoded = list(
            encoded_rows(dataset, vae, "image", 8, range(NUM_IMAGES), torch.device("cpu"), batch_size,
                         num_draws=2, random_crop=True, random_flip=True)
        )  # fmt: skip
        results.append((sum((rows for rows, _ in encoded), []), torch.cat([codes for _, codes in encoded])))
    assert results[0][0] == [i for i in range(NUM_IMAGES) if i != 6]
    for rows, codes in results[1:]:
        assert rows == results[0][0] and torch.equal(codes.int(), results[0][1].int())


def test_the_digest_of_a_model_is_of_its_weights_and_its_configuration(vae, tmp_path):
    digest = digest_of(vae)
    vae.save_pretrained(tmp_path)
    again = RQVAEModel.from_pretrained(tmp_path)
    assert digest_of(again) == digest
    again.register_to_config(sample_size=2 * vae.config.sample_size)
    assert digest_of(again) != digest
