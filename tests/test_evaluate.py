"""examples/evaluate.py and what feeds it: every image once, the same however made, and compared with its like."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compute_statistics
import datasets
import numpy as np
import pytest
import torch
import train_classifier
from accelerate.state import AcceleratorState, GradientState
from claimed_device import claimed_device
from components import NUM_CLASSES, tiny_pipeline, tiny_rq_pipeline
from emoji_evaluation import SceneClassifier
from PIL import Image
from safetensors.torch import save_file

from rq_draft_revise import DraftAndReviseInpaintPipeline, DraftAndRevisePipeline, RQVAEModel
from rq_draft_revise.features import ImageClassifierModel, load_feature_network
from rq_draft_revise.metrics import (
    ReferenceStatistics,
    frechet_distance,
    inception_score,
    moments,
    precision_and_recall,
    psnr,
)


ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 4 * NUM_CLASSES


def load_script(path: Path):
    """By its path: `import evaluate` may mean the library of that name."""
    spec = importlib.util.spec_from_file_location("evaluate_script", path)
    script = sys.modules["evaluate_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = load_script(ROOT / "examples" / "evaluate.py")


pytestmark = pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")


def tiny_classifier(size: int) -> ImageClassifierModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = ImageClassifierModel(5, size, block_channels=(8, 16), layers_per_block=1)
        for parameter in classifier.parameters():  # at initialization all its answers are alike
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return classifier.eval()


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """Pipelines `class`, `text`, `none`, `rq`, `inpaint`; a `classifier` of 8×8 pixels; `train.parquet`.

    Its statistics are `reference.npz`.
    """
    folder = tmp_path_factory.mktemp("problem")
    tiny_pipeline("class").save_pretrained(folder / "class")
    tiny_pipeline("text").save_pretrained(folder / "text")
    tiny_pipeline(None).save_pretrained(folder / "none")
    tiny_rq_pipeline("class").save_pretrained(folder / "rq")
    DraftAndReviseInpaintPipeline.from_pretrained(folder / "class").save_pretrained(folder / "inpaint")
    tiny_classifier(8).save_pretrained(folder / "classifier")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (folder / "captions.txt").write_text("a cat at dusk\nan owl\nthe volcano in the snow\na rocket at night\n")

    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    labels = [i % 2 for i in range(30)]
    images = [Image.fromarray(random.integers(0, 110, (10, 9, 3), dtype=np.uint8) + 145 * np.uint8(i)) for i in labels]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
        folder / "train.parquet"
    )
    run_statistics(folder, folder / "reference.npz")
    return folder


def command_line(flags: dict) -> list[str]:
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def run_statistics(problem: Path, output: Path, **flags) -> ReferenceStatistics:
    defaults = dict(data_files=problem / "train.parquet", resolution=8, features=problem / "classifier", output=output)
    compute_statistics.main(compute_statistics.parse_args(command_line({**defaults, "batch_size": 7, **flags})))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return ReferenceStatistics.load(output)


def evaluation_flags(problem: Path, output_dir: Path, **flags) -> list[str]:
    defaults = dict(
        pipeline=problem / "class",
        num_images=NUM_IMAGES,
        batch_size=6,  # divides nothing: the last batch is smaller
        features=problem / "classifier",
        reference=problem / "reference.npz",
        allow_few_samples=True,
        output_dir=output_dir,
    )
    return command_line({**defaults, **flags})


def evaluate(problem: Path, output_dir: Path, **flags) -> dict:
    script.main(script.parse_args(evaluation_flags(problem, output_dir, **flags)))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return json.loads((output_dir / "results.json").read_text())


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The indices of the images that were sampled, in order."""
    indices, make = [], script.Sampling.make

    def make_and_note(self, wanted):
        indices.extend(wanted)
        return make(self, wanted)

    monkeypatch.setattr(script.Sampling, "make", make_and_note)
    return indices


def saved_images(output_dir: Path) -> torch.Tensor:
    paths = sorted((output_dir / "images").glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])


# -------------------------------------------------------------------------------------------------- what is an image


def test_image_i_is_what_the_pipeline_draws_from_its_class_and_seed_alone(problem, tmp_path):
    evaluate(problem, tmp_path, save_images=True, seed=7)
    images = saved_images(tmp_path)
    assert len(images) == NUM_IMAGES
    pipe = DraftAndRevisePipeline.from_pretrained(problem / "class")
    for index in (0, 8, 19):
        generator = torch.Generator().manual_seed(script.image_seed(7, index))
        alone = pipe(class_labels=index % NUM_CLASSES, generator=generator, output_type="pt").images
        assert torch.equal((255 * alone).round().to(torch.uint8)[0], images[index])


def test_the_batch_size_changes_no_image(problem, tmp_path):
    one = evaluate(problem, tmp_path / "6")
    other = evaluate(problem, tmp_path / "20", batch_size=20)
    assert one["drawn"]["images_sha256"] == other["drawn"]["images_sha256"]
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
    another = evaluate(problem, tmp_path / "seed", seed=1)
    assert one["drawn"]["images_sha256"] != another["drawn"]["images_sha256"]
    assert one["drawn"]["num_distinct_images"] == NUM_IMAGES


def test_runs_of_different_seeds_share_no_generator():
    seeds = {script.image_seed(seed, index) for seed in range(20) for index in range(200)}
    assert len(seeds) == 20 * 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_every_class_comes_exactly_as_often(problem, tmp_path):
    drawn = evaluate(problem, tmp_path, metrics=["fid"])["drawn"]
    assert (drawn["condition"], drawn["num_conditions"], drawn["images_per_condition"]) == ("class_labels", 5, 4)
    with pytest.raises(ValueError, match="--num_images must be a multiple of the 5 classes.*got 21"):
        evaluate(problem, tmp_path / "21", num_images=21)


def test_captions_come_from_a_file_or_a_data_set(problem, tmp_path):
    flags = dict(pipeline=problem / "text", metrics=[], save_images=True)
    captions = (problem / "captions.txt").read_text().splitlines()
    datasets.Dataset.from_dict({"text": captions}).to_parquet(tmp_path / "captions.parquet")
    by_file = evaluate(problem, tmp_path / "file", captions=problem / "captions.txt", num_images=None, **flags)
    by_rows = evaluate(problem, tmp_path / "rows", data_files=tmp_path / "captions.parquet", num_images=None, **flags)
    assert by_file["drawn"] == by_rows["drawn"] and by_file["drawn"]["num_images"] == 4
    fewer = evaluate(problem, tmp_path / "fewer", captions=problem / "captions.txt", num_images=3, **flags)
    twice = evaluate(problem, tmp_path / "twice", captions=problem / "captions.txt", num_images=8, **flags)
    assert fewer["drawn"]["images_per_condition"] == 1 and twice["drawn"]["images_per_condition"] == 2
    assert torch.equal(saved_images(tmp_path / "fewer"), saved_images(tmp_path / "twice")[:3])
    with pytest.raises(ValueError, match="--num_images must be a multiple of the 4 captions.*got 6"):
        evaluate(problem, tmp_path / "six", captions=problem / "captions.txt", num_images=6, **flags)
    with pytest.raises(ValueError, match="give them by --captions"):
        evaluate(problem, tmp_path / "nothing", **flags)


def test_a_caption_is_what_stands_between_two_newlines(problem, tmp_path):
    text = "an owl\x85at night\u2028in the snow\na cat\n"
    for name, encoded in (
        ("plain", text.encode()),
        ("mark", text.encode("utf-8-sig")),
        ("windows", text.replace("\n", "\r\n").encode()),
        ("no newline at the end", text.removesuffix("\n").encode()),
    ):
        (tmp_path / "captions.txt").write_bytes(encoded)
        args = script.parse_args(evaluation_flags(problem, tmp_path, captions=tmp_path / "captions.txt"))
        assert script.read_captions(args) == ["an owl\x85at night\u2028in the snow", "a cat"], name


@pytest.mark.parametrize("bad", ["", " \t", None, 7, ["an owl"]])
def test_a_caption_that_is_blank_or_no_text_is_refused_at_the_start_by_its_row(problem, tmp_path, made, bad):
    flags = dict(pipeline=problem / "text", metrics=[], save_images=True, num_images=None, batch_size=2)
    if isinstance(bad, str):
        (tmp_path / "captions.txt").write_text(f"a cat\nan owl\n{bad}\nthe volcano\n")
        with pytest.raises(ValueError, match="--captions must hold texts that are not blank, got '' in line 3 of"):
            evaluate(problem, tmp_path / "file", captions=tmp_path / "captions.txt", **flags)
    good = {int: 5, list: ["a cat"]}.get(type(bad), "a cat")
    datasets.Dataset.from_dict({"text": ["a cat" if good == "a cat" else good] * 3 + [bad]}).to_parquet(
        tmp_path / "captions.parquet"
    )
    row = 3 if good == "a cat" else 0
    with pytest.raises(
        ValueError, match=f"--caption_column must hold texts that are not blank, got .* in row {row} of"
    ):
        evaluate(problem, tmp_path / "rows", data_files=tmp_path / "captions.parquet", **flags)
    assert made == [] and not list(tmp_path.glob("*/run.json"))


@pytest.mark.parametrize("pipeline", ["none", "rq"])
def test_any_pipeline_of_the_package_is_evaluated(pipeline, problem, tmp_path):
    flags = dict(top_k=[9, 8, 7], temperature=0.9) if pipeline == "rq" else dict(num_revisions=0)
    drawn = evaluate(problem, tmp_path, pipeline=problem / pipeline, **flags)["drawn"]
    if pipeline == "rq":
        expected = {"guidance_scale": 1.0, "temperature": 0.9, "top_k": [9, 8, 7], "top_p": None}
        assert drawn["sampler"] == expected and drawn["pipeline_class"] == "RQTransformerPipeline"
        with pytest.raises(ValueError, match="--num_revisions is no argument of RQTransformerPipeline"):
            evaluate(problem, tmp_path / "no", pipeline=problem / "rq", num_revisions=1)
    else:
        assert drawn["condition"] is None and drawn["sampler"]["num_revisions"] == 0


@pytest.mark.parametrize("reconstruct", [False, True], ids=["sampling", "reconstruction"])
def test_on_a_device_it_makes_the_images_and_scores_of_the_cpu(reconstruct, problem, tmp_path):
    flags = {}
    if reconstruct:
        flags = dict(reconstruct=True, data_files=problem / "train.parquet", split="train", num_images=None,
                     reference=None, metrics=["rfid", "psnr"])  # fmt: skip
    expected = evaluate(problem, tmp_path / "cpu", save_images=True, **flags)
    with claimed_device() as seen:
        results = evaluate(problem, tmp_path / "device", save_images=True, **flags)
    assert seen.kernels, "nothing ran there"
    assert results["metrics"] == pytest.approx(expected["metrics"], rel=1e-3)
    images = [saved_images(tmp_path / name).int() for name in ("cpu", "device")]
    assert (images[0] - images[1]).abs().max() <= 1


# ------------------------------------------------------------------------------------------------------------- scores


def test_the_scores_are_those_of_the_saved_images(problem, tmp_path):
    results = evaluate(problem, tmp_path, save_images=True)
    network = load_feature_network(str(problem / "classifier"))
    output = network(saved_images(tmp_path))
    reference = ReferenceStatistics.load(problem / "reference.npz")
    mean, std = inception_score(output.logits)
    expected = {
        "fid": frechet_distance(reference.mean, reference.covariance, *moments(output.features)),
        "inception_score": mean,
        "inception_score_std": std,
        **precision_and_recall(reference.features, output.features),
    }
    assert results["metrics"] == pytest.approx(expected, rel=1e-4)
    assert results["metrics"]["fid"] > 1e-3


def test_the_results_say_what_the_figures_depend_on(problem, tmp_path):
    results = evaluate(problem, tmp_path, guidance_scale=1.5)
    sampler = results["drawn"]["sampler"]
    assert set(sampler) == set(script.SAMPLER_ARGUMENTS)
    assert sampler["guidance_scale"] == 1.5 and sampler["num_inference_steps"] == 4  # given; the pipeline's own
    assert set(results["drawn"]["weights_sha256"]) == {"vae", "transformer"}
    assert results["drawn"]["seed"] == 0 and results["drawn"]["dtype"] == "float32"
    assert results["scored"]["protocol"] == "torch-fidelity"
    assert results["scored"]["network_sha256"] == results["scored"]["reference"]["network_sha256"]
    assert {"torch", "diffusers", "rq_draft_revise", "python"} <= set(results["versions"])
    assert results["hardware"][0]["device"] == "cpu" and results["num_processes"] == [1]
    assert {"processor", "cpu_model", "num_cores", "num_gpus", "num_threads"} <= set(results["hardware"][0])
    assert {"tokenizers", "torchvision"} <= set(results["versions"])
    assert results["seconds"]["sampling"] > 0 and results["seconds"]["timed_images"] == NUM_IMAGES
    assert results["arguments"]["guidance_scale"] == 1.5


def test_reconstructions_are_scored_beside_their_originals(problem, tmp_path):
    flags = dict(
        reconstruct=True, data_files=problem / "train.parquet", split="train", num_images=None, reference=None
    )
    results = evaluate(problem, tmp_path, metrics=["rfid", "psnr"], save_images=True, **flags)
    args = script.parse_args(evaluation_flags(problem, tmp_path, **flags))
    work = script.Reconstruction(args, "cpu")
    originals, vae = work.read(range(30)), RQVAEModel.from_pretrained(problem / "class", subfolder="vae")
    with torch.no_grad():
        sample = vae.decode(vae.encode(originals / 127.5 - 1).codes).sample
    expected = (255 * (sample / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8)
    assert (saved_images(tmp_path).int() - expected.int()).abs().max() <= 1
    assert results["metrics"]["psnr"] == pytest.approx(psnr(expected, originals).mean().item(), rel=1e-3)
    network = load_feature_network(str(problem / "classifier"))
    rfid = frechet_distance(*moments(network(originals).features), *moments(network(expected).features))
    assert results["metrics"]["rfid"] == pytest.approx(rfid, rel=1e-2)
    other = dict(flags, split="train[:20]")
    with pytest.raises(ValueError, match="another run: its num_images"):
        evaluate(problem, tmp_path, metrics=["psnr"], **other)
    with pytest.raises(ValueError, match="another run: its originals"):
        evaluate(problem, tmp_path, metrics=["psnr"], **dict(other, split="train", image_column="image", num_images=30,
                 data_files=[problem / "train.parquet", problem / "train.parquet"]))  # fmt: skip
    with pytest.raises(ValueError, match="--metrics ssim needs images of at least 11 pixels, got 8"):
        evaluate(problem, tmp_path / "ssim", metrics=["ssim"], **flags)


def test_the_emoji_classifier_is_named_by_a_flag(problem, tmp_path):
    record = {"objects": ["cat", "owl"], "backdrops": ["sea", "snow", "dusk"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = SceneClassifier(2, 3, width=32)
    save_file(classifier.state_dict(), tmp_path / "emoji.safetensors", {"record": json.dumps(record)})
    emoji = f"emoji:{tmp_path / 'emoji.safetensors'}"
    statistics = run_statistics(problem, tmp_path / "statistics.npz", features=emoji)
    assert statistics.network == "emoji-classifier" and statistics.mean.shape == (128,)
    flags = dict(features=emoji, reference=tmp_path / "statistics.npz", metrics=["fid"])
    assert evaluate(problem, tmp_path / "run", **flags)["metrics"]["fid"] > 0
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="--features must name a classifier of emoji scenes"):
        evaluate(problem, tmp_path / "text", features=f"emoji:{tmp_path / 'text.safetensors'}")


# --------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("save", [False, True])
def test_a_killed_run_goes_on_and_makes_no_image_twice(problem, tmp_path, made, monkeypatch, save):
    whole = evaluate(problem, tmp_path / "whole")
    made.clear()
    measure, calls = script.measure, []

    def killed_in_the_third_batch(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(script, "measure", killed_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(problem, tmp_path / "killed", save_images=save)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert made == list(range(18)) and not (tmp_path / "killed" / "results.json").exists()

    # The third batch was sampled and not measured: its images are made again only if they were not kept.
    resumed = evaluate(problem, tmp_path / "killed", save_images=save)
    assert made[18:] == (list(range(18, 20)) if save else list(range(12, 20)))
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["drawn"] == whole["drawn"]

    made.clear()
    assert evaluate(problem, tmp_path / "killed", save_images=save)["metrics"] == whole["metrics"]
    assert made == [] and resumed["seconds"]["images_made_in_this_run"] == (2 if save else 8)


def test_saved_images_are_scored_anew_without_sampling(problem, tmp_path, made):
    first = evaluate(problem, tmp_path, save_images=True, metrics=[])
    made.clear()
    second = evaluate(problem, tmp_path)
    assert made == [] and "fid" in second["metrics"] and first["metrics"] == {}
    assert first["drawn"] == second["drawn"]


def test_the_time_of_sampling_stays_that_of_the_run_that_sampled(problem, tmp_path):
    names = ("sampling", "sampling_per_image", "timed_images")
    first = evaluate(problem, tmp_path, save_images=True, metrics=[])["seconds"]
    (unscored,) = tmp_path.glob("batches-*")
    second = evaluate(problem, tmp_path)["seconds"]
    assert [first[name] for name in names] == [second[name] for name in names]
    assert second["timed_images"] == NUM_IMAGES and second["images_made_in_this_run"] == 0
    # Nothing is known of the time once the batches are gone: that is null, and not no time at all.
    shutil.rmtree(unscored)
    for path in tmp_path.glob("batches-*/*"):
        path.unlink()
    assert [evaluate(problem, tmp_path)["seconds"][name] for name in names] == [None, None, 0]


def test_a_finished_run_can_still_be_asked_for_its_images(problem, tmp_path, made):
    evaluate(problem, tmp_path / "saved", save_images=True)
    expected = saved_images(tmp_path / "saved")
    first = evaluate(problem, tmp_path / "run")
    assert not (tmp_path / "run" / "images").exists()
    second = evaluate(problem, tmp_path / "run", save_images=True)
    assert torch.equal(saved_images(tmp_path / "run"), expected)
    assert first["metrics"] == second["metrics"] and first["drawn"] == second["drawn"]
    made.clear()
    (tmp_path / "run" / "images" / "000007.png").unlink()
    evaluate(problem, tmp_path / "run", save_images=True)
    assert made == list(range(6, 12)) and torch.equal(saved_images(tmp_path / "run"), expected)


@pytest.mark.parametrize("damage", ["empty", "half", "middle", "jpeg"])
@pytest.mark.parametrize("scored", [False, True])
def test_a_damaged_image_is_made_again(problem, tmp_path, made, damage, scored):
    whole = evaluate(problem, tmp_path, save_images=True, metrics=["fid"] if scored else [])
    expected = saved_images(tmp_path)
    path = tmp_path / "images" / "000013.png"
    content = path.read_bytes()
    if damage == "jpeg":
        Image.open(path).save(path, format="JPEG")
    else:
        middle = len(content) // 2
        broken = content[: middle - 8] + bytes(16) + content[middle + 8 :]
        path.write_bytes({"empty": b"", "half": content[:middle], "middle": broken}[damage])
    made.clear()
    again = evaluate(problem, tmp_path, save_images=True, metrics=["fid"])
    assert again["drawn"] == whole["drawn"]
    if scored and damage == "middle":  # of a batch that is finished only the ends are looked at
        assert made == []
    else:
        assert made == list(range(12, 18)) and torch.equal(saved_images(tmp_path), expected)


def test_a_saved_image_of_another_size_or_mode_is_refused_by_name(problem, tmp_path):
    evaluate(problem, tmp_path, save_images=True, metrics=[])
    path = tmp_path / "images" / "000013.png"
    for mode, size in (("RGB", (9, 8)), ("RGBA", (8, 8)), ("L", (8, 8))):
        Image.new(mode, size).save(path)
        message = f"000013.png must be an RGB image of 8×8 pixels.*got {mode} of {size[0]}×8"
        with pytest.raises(ValueError, match=message):
            evaluate(problem, tmp_path)


@pytest.mark.parametrize("left", ["images", "batches"])
def test_images_of_which_no_record_says_what_they_are_are_refused(problem, tmp_path, made, left):
    evaluate(problem, tmp_path / "run", save_images=left == "images")
    made.clear()
    (tmp_path / "run" / "run.json").unlink()
    if left == "images":
        (batches,) = (tmp_path / "run").glob("batches-*")
        shutil.rmtree(batches)
    with pytest.raises(ValueError, match="must have a run.json.*000000"):
        evaluate(problem, tmp_path / "run")
    assert made == [] and not (tmp_path / "run" / "run.json").exists()


def test_half_a_record_is_named_and_not_written_over(problem, tmp_path):
    evaluate(problem, tmp_path, metrics=["fid"])
    path = tmp_path / "run.json"
    for content in (path.read_text()[:100], "", "[1, 2]"):
        path.write_text(content)
        with pytest.raises(ValueError, match="run.json must be the record of a run, and is damaged.*another folder"):
            evaluate(problem, tmp_path, metrics=["fid"])
        assert path.read_text() == content


@pytest.mark.parametrize("flags", [dict(seed=1), dict(num_revisions=0), dict(batch_size=5), dict(pipeline="rq")])
def test_the_folder_of_another_run_is_refused(problem, tmp_path, made, flags):
    evaluate(problem, tmp_path)
    made.clear()
    before = (tmp_path / "results.json").read_text()
    if "pipeline" in flags:
        flags = dict(pipeline=problem / flags["pipeline"])
    with pytest.raises(ValueError, match="holds images of another run") as refused:
        evaluate(problem, tmp_path, **flags)
    if "num_revisions" in flags:
        assert "its sampler is {'num_revisions': 1}, and now it is {'num_revisions': 0}" in str(refused.value)
    assert made == [] and (tmp_path / "results.json").read_text() == before


def test_another_tokenizer_or_configuration_with_the_same_weights_is_another_run(problem, tmp_path, made):
    flags = dict(captions=problem / "captions.txt", num_images=None, metrics=[], save_images=True)
    pipe = DraftAndRevisePipeline.from_pretrained(problem / "text")
    evaluate(problem, tmp_path / "run", pipeline=problem / "text", **flags)
    made.clear()

    tokenizer = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["owl"] = vocabulary["owl"], vocabulary["cat"]
    shutil.copytree(problem / "text", tmp_path / "other")
    (tmp_path / "other" / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="another run: its input_ids_sha256"):
        evaluate(problem, tmp_path / "run", pipeline=tmp_path / "other", **flags)

    shutil.copytree(problem / "text", tmp_path / "heads")
    config = json.loads((problem / "text" / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": 2, "attention_head_dim": 16}  # the same shapes
    (tmp_path / "heads" / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another run: its config_sha256"):
        evaluate(problem, tmp_path / "run", pipeline=tmp_path / "heads", **flags)
    assert made == []


def test_originals_that_were_rebuilt_are_not_mixed_with_those_before(problem, tmp_path):
    shutil.copy(problem / "train.parquet", tmp_path / "train.parquet")
    flags = dict(reconstruct=True, data_files=tmp_path / "train.parquet", split="train", reference=None)
    flags |= dict(metrics=["psnr"], num_images=None)
    evaluate(problem, tmp_path / "run", **flags)
    next(iter((tmp_path / "run").glob("batches-*/000001.safetensors"))).unlink()
    assert evaluate(problem, tmp_path / "run", **flags)["drawn"]["num_images"] == 30  # as nothing has changed
    rows = datasets.load_dataset("parquet", data_files=str(problem / "train.parquet"), split="train")
    rows.select(range(29, -1, -1)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="another run: its originals_fingerprint"):
        evaluate(problem, tmp_path / "run", **flags)


def test_a_run_of_an_earlier_version_goes_on_where_its_record_suffices(problem, tmp_path, made):
    def forget(output_dir: Path, *names: str) -> None:
        path = output_dir / "run.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in record.items() if name not in names}))

    whole = evaluate(problem, tmp_path / "class")
    forget(tmp_path / "class", "config_sha256")
    made.clear()
    assert evaluate(problem, tmp_path / "class")["metrics"] == whole["metrics"] and made == []

    flags = dict(pipeline=problem / "text", captions=problem / "captions.txt", num_images=None, metrics=[])
    evaluate(problem, tmp_path / "text", save_images=True, **flags)
    forget(tmp_path / "text", "config_sha256", "input_ids_sha256")
    with pytest.raises(ValueError, match="earlier version.*does not say their input_ids_sha256.*add ") as error:
        evaluate(problem, tmp_path / "text", save_images=True, **flags)
    # and what it says to do, does
    path = tmp_path / "text" / "run.json"
    told = json.loads("{" + str(error.value).rsplit(" add ", 1)[1].rsplit(" to ", 1)[0] + "}")
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    evaluate(problem, tmp_path / "text", save_images=True, **flags)


def test_a_damaged_batch_is_one_clear_error_and_can_be_made_again(problem, tmp_path):
    whole = evaluate(problem, tmp_path)
    (path,) = tmp_path.glob("batches-*/000001.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RuntimeError, match="000001.safetensors is damaged.*delete it"):
        evaluate(problem, tmp_path)
    path.unlink()
    assert evaluate(problem, tmp_path)["metrics"] == whole["metrics"]


# --------------------------------------------------------------------------------------------- refused before sampling


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(allow_few_samples=False), "at least 10,000.*--allow_few_samples"),
        (dict(protocol="adm"), "protocol 'torch-fidelity'.*'adm'"),
        (dict(reference=None), "--reference must be given"),
        (dict(reference="nowhere.npz"), "--reference must name a file .*, got 'nowhere.npz': there"),
        (dict(features="nowhere"), "--features must name a file or folder that is there, got 'nowhere'"),
        (dict(features="emoji:nowhere"), "--features must name a file or folder that is there, got 'emoji:nowhere'"),
        (dict(features="other"), "other weights"),
        (dict(features="larger"), "8×8|16×16"),
        (dict(pipeline="classifier"), "model_index.json"),
        (dict(pipeline="inpaint"), "needs no image.*got a DraftAndReviseInpaintPipeline in .*inpaint"),
        (dict(pipeline="foreign"), "`pipeline` must be one of .*RQTransformerPipeline.*got 'DDPMPipeline'"),
        (dict(metrics=["clip_score"], clip="nowhere"), "--clip"),
        (dict(metrics=["rfid"]), "--metrics must be among"),
        (dict(metrics=[]), "nothing to do"),
        (dict(captions="captions.txt"), "--captions are for a text-conditional"),
        (dict(num_images=5, metrics=["inception_score"]), "at least 10 for inception_score"),
        (dict(num_images=0), "--num_images must be at least 1"),
        (dict(batch_size=0), "--batch_size must be at least 1"),
        (dict(seed=-1), "--seed must lie in"),
        (dict(temperature=0), "temperature"),
        (dict(num_inference_steps=99), "num_inference_steps"),
        (dict(inception_weights="w.pth"), "`inception_weights` are for the network 'inception'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_sampled(
    problem, tmp_path, made, flags, message, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no look-ups of "nowhere"
    flags = dict(flags)
    if flags.get("features") == "other":
        classifier = tiny_classifier(8)
        classifier.head.bias.data += 1
        classifier.save_pretrained(tmp_path / "other")
        flags["features"] = tmp_path / "other"
    elif flags.get("features") == "larger":
        tiny_classifier(16).save_pretrained(tmp_path / "larger")
        flags["features"] = tmp_path / "larger"
    for name in ("pipeline", "captions"):
        if name in flags:
            flags[name] = problem / flags[name]
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(problem, tmp_path / "run", **flags)
    assert made == [] and not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("metric", ["fid", "precision_recall"])
def test_few_real_images_are_refused_like_few_samples(problem, tmp_path, made, metric):
    name = {"fid": "reference", "precision_recall": "reference.features"}[metric]
    flags = dict(metrics=[metric], num_images=10_000, allow_few_samples=False)
    with pytest.raises(ValueError, match=f"`{name}` must be at least 10,000.*got 30.*--allow_few_samples"):
        evaluate(problem, tmp_path, **flags)
    assert made == [] and not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("metric, name", [("fid", "mu"), ("fid", "sigma"), ("precision_recall", "features")])
def test_a_reference_that_is_not_finite_is_refused_before_anything_is_sampled(problem, tmp_path, made, metric, name):
    with np.load(problem / "reference.npz") as file:
        arrays = dict(file)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    with pytest.raises(ValueError, match=f"reference.* must be finite, got NaN or infinity|`{name}`.*finite"):
        evaluate(problem, tmp_path / "run", metrics=[metric], reference=tmp_path / "nan.npz")
    assert made == [] and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_all_images_and_features_of_some(problem, tmp_path):
    network = load_feature_network(str(problem / "classifier"))
    rows = datasets.load_dataset("parquet", data_files=str(problem / "train.parquet"), split="train")
    features = network(
        torch.stack([script.get_protocol("torch-fidelity").prepare(i, 8) for i in rows["image"]])
    ).features
    statistics = run_statistics(problem, tmp_path / "statistics.npz", num_features=8)
    mean, covariance = moments(features)
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.covariance, covariance, rtol=1e-4, atol=1e-6)
    places = [int((features - kept).abs().sum(1).argmin()) for kept in statistics.features]
    assert len(set(places)) == 8 and places == sorted(places)
    assert max(places) > 15  # drawn from all: a data set may be sorted by class
    torch.testing.assert_close(statistics.features, features[places], rtol=1e-4, atol=1e-5)
    assert statistics.describe()["num_samples"] == 30 and statistics.describe()["resolution"] == 8
    fewer = run_statistics(problem, tmp_path / "fewer.npz", max_images=10, num_features=0)
    assert fewer.num_samples == 10 and fewer.features is None
    with pytest.raises(ValueError, match="--reference must hold features"):
        evaluate(problem, tmp_path / "run", reference=tmp_path / "fewer.npz")


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(format="adm"), "sFID.*'inception'"),
        (dict(output="statistics.pt"), "--output must end in .npz"),
        (dict(max_images=1), "--max_images must be at least 2"),
        (dict(split="test[:1]"), "Unknown split|split"),
        (dict(resolution=0), "--resolution must be at least 1"),
    ],
)
def test_statistics_of_nothing_are_refused(problem, tmp_path, flags, message):
    flags = {"output": tmp_path / "statistics.npz", **flags}
    if "split" in flags:
        flags["max_images"] = None
        with pytest.raises(ValueError, match="at least 2 images"):
            run_statistics(problem, flags.pop("output"), **dict(flags, split="train[:1]"))
        return
    with pytest.raises(ValueError, match=message):
        run_statistics(problem, flags.pop("output"), **flags)


def test_a_damaged_real_image_is_an_error_and_not_left_out(problem, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    for name, image in (("damaged", {"bytes": b"no image", "path": None}), ("missing", None)):
        rows, path = {"image": [image] * 3}, tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        with pytest.raises(ValueError, match="Image 0 of the data set cannot be read"):
            run_statistics(problem, tmp_path / "statistics.npz", data_files=path)
        assert not (tmp_path / "statistics.npz").exists()


# ---------------------------------------------------------------------------------------------------------- processes


def launch(name: str, flags: list[str], num_processes: int) -> str:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_two_processes_make_the_images_and_scores_of_one(tmp_path):
    """Of the bundled pipeline, from captions; the statistics too are made by two."""
    scenes = [
        f"a {thing} {place}" for thing in ("volcano", "cat", "robot", "ship") for place in ("at dusk", "in the snow")
    ]
    (tmp_path / "captions.txt").write_text("\n".join(scenes))
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "train.parquet")
    tiny_classifier(64).save_pretrained(tmp_path / "classifier")
    common = dict(features=tmp_path / "classifier")
    statistics = dict(data_files=tmp_path / "train.parquet", resolution=64, batch_size=6, **common)
    alone = run_statistics(tmp_path, tmp_path / "1.npz", **statistics)
    launch("compute_statistics", command_line(dict(statistics, output=tmp_path / "2.npz")), num_processes=2)
    together = ReferenceStatistics.load(tmp_path / "2.npz")
    torch.testing.assert_close(alone.covariance, together.covariance, rtol=1e-9, atol=1e-12)
    assert torch.equal(alone.features, together.features) and alone.describe() == together.describe()

    flags = dict(
        pipeline=ROOT / "pipelines" / "emoji-scenes",
        captions=tmp_path / "captions.txt",
        num_images=32,
        batch_size=6,
        num_inference_steps=3,
        num_revisions=1,
        save_images=True,
        reference=tmp_path / "1.npz",
        **common,
    )
    one = evaluate(tmp_path, tmp_path / "one", **flags)
    launch("evaluate", evaluation_flags(tmp_path, tmp_path / "two", **flags), num_processes=2)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert torch.equal(saved_images(tmp_path / "one"), saved_images(tmp_path / "two"))
    assert one["drawn"] == two["drawn"] and one["metrics"] == two["metrics"]
    assert two["num_processes"] == [2] and two["drawn"]["num_distinct_images"] == 32
    assert two["seconds"]["images_made_in_this_run"] == 32  # by both together


# ---------------------------------------------------------------------------------------------------------- classifier


def test_a_classifier_learns_and_is_a_feature_network(problem, tmp_path):
    flags = dict(data_files=problem / "train.parquet", test_files=problem / "train.parquet", resolution=8)
    flags |= dict(train_batch_size=10, max_train_steps=25, lr_warmup_steps=1, block_channels=[8, 16])
    flags |= dict(random_flip=True, logging_steps=5, learning_rate=1e-2, output_dir=tmp_path)
    train_classifier.main(train_classifier.parse_args(command_line(flags)))
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["test_accuracy"] > 0.9 and record["steps"] == 25
    network = load_feature_network(str(tmp_path))
    images = torch.cat([torch.full((1, 3, 8, 8), value, dtype=torch.uint8) for value in (50, 200)])
    output = network(images)
    assert output.logits.argmax(1).tolist() == [0, 1] and output.features.shape == (2, 16)
    assert ImageClassifierModel.load_config(tmp_path)["labels"] == ["dark", "light"]


def test_the_split_to_test_on_is_found(tmp_path):
    for split in ("train", "validation"):
        for label in ("dark", "light"):  # a single folder would be no class
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / label / "1.png")
    flags = dict(train_data_dir=tmp_path, resolution=8, output_dir=tmp_path)
    args = train_classifier.parse_args(command_line(flags))
    assert train_classifier.test_split_of(args) == "validation"
    args = train_classifier.parse_args(command_line(flags | dict(test_split="test")))
    with pytest.raises(ValueError, match=r"`test_split` must be of \['train', 'validation'\], got 'test' of"):
        train_classifier.main(args)


def test_a_classifier_that_diverges_ends_and_is_not_saved(problem, tmp_path):
    flags = dict(data_files=problem / "train.parquet", test_split="none", resolution=8, learning_rate=1e8)
    flags |= dict(train_batch_size=10, max_train_steps=40, lr_warmup_steps=0, block_channels=[8, 16])
    with pytest.raises(RuntimeError, match="10 "):
        train_classifier.main(train_classifier.parse_args(command_line(flags | dict(output_dir=tmp_path / "run"))))
    assert not list(tmp_path.glob("run/*"))


def test_a_shift_moves_each_image_by_whole_pixels():
    images = torch.arange(2 * 3 * 6 * 6).float().view(2, 3, 6, 6)
    shifted = train_classifier.shift(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    for image, whole in zip(shifted, padded):
        windows = [whole[:, top : top + 6, left : left + 6] for top in range(5) for left in range(5)]
        assert sum(torch.equal(image, window) for window in windows) == 1
    assert torch.equal(train_classifier.shift(images, 0, torch.Generator()), images)


@pytest.mark.parametrize(
    "flag, value",
    [("resolution", 0), ("max_train_seconds", 0), ("label_smoothing", 1), ("block_channels", 12), ("max_shift", 8)],
)
def test_a_flag_of_the_classifier_out_of_range_is_refused_by_name(problem, tmp_path, flag, value):
    flags = dict(data_files=problem / "train.parquet", resolution=8, output_dir=tmp_path)
    with pytest.raises(ValueError, match=f"--{flag} must.*got .*{value}"):
        train_classifier.parse_args(command_line({**flags, flag: value}))


def test_a_label_column_that_is_none_is_refused(problem, tmp_path):
    flags = dict(data_files=problem / "train.parquet", resolution=8, output_dir=tmp_path, label_column="class")
    with pytest.raises(ValueError, match="--label_column must be one of .*got 'class'"):
        train_classifier.main(train_classifier.parse_args(command_line(flags)))
