"""examples/reproduce_tables.py: every cell is what a run of its own would give, and a verdict follows from figures."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import plot_tables
import pytest
import torch
from components import tiny_pipeline, tiny_rq_transformer, tiny_transformer, tiny_vae
from PIL import Image
from safetensors.torch import save_file
from test_evaluate import command_line, run_statistics, tiny_classifier

from rq_draft_revise import (
    DraftAndReviseInpaintPipeline,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerPipeline,
)
from rq_draft_revise.features import load_feature_network
from rq_draft_revise.metrics import ReferenceStatistics, frechet_distance, moments
from rq_draft_revise.provenance import image_seed


import reproduce_tables  # isort: skip


pytestmark = pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")

SIZE, NUM_IMAGES, NUM_CLASSES = 16, 12, 5


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """Of 16×16 pixels: `rq` 8×8×3, `vq` 16×16×1, `ar`, a `classifier`, `train.parquet`, its `reference.npz`."""
    folder = tmp_path_factory.mktemp("tables")
    vae = tiny_vae(sample_size=SIZE)
    transformer = tiny_transformer("class", vae=vae, height=8, width=8)
    DraftAndRevisePipeline(vae, transformer, DraftAndReviseScheduler()).save_pretrained(folder / "rq")
    baseline = tiny_rq_transformer("class", vae=vae, height=8, width=8)
    RQTransformerPipeline(vae, baseline).save_pretrained(folder / "ar")
    blocks = dict(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    vae = tiny_vae(sample_size=SIZE, code_depth=1, block_out_channels=(8,), **blocks)
    transformer = tiny_transformer("class", vae=vae, height=16, width=16)
    DraftAndRevisePipeline(vae, transformer, DraftAndReviseScheduler()).save_pretrained(folder / "vq")
    tiny_classifier(SIZE).save_pretrained(folder / "classifier")

    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(30)]
    rows = {"image": images, "label": [i % NUM_CLASSES for i in range(30)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    run_statistics(folder, folder / "reference.npz", resolution=SIZE)
    return folder


def reproduce(problem: Path, output_dir: Path, **flags) -> dict:
    defaults = dict(
        pipeline=problem / "rq",
        data_files=problem / "train.parquet",
        features=problem / "classifier",
        reference=problem / "reference.npz",
        num_images=NUM_IMAGES,
        batch_size=5,  # divides nothing: the last batch is smaller
        output_dir=output_dir / "runs",
        results=output_dir / "results.json",
        device="cpu",
    )
    arguments = command_line({**defaults, **flags})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce_tables, "NUM_HALVES", 20)  # of sixty cells: the figures themselves need none
        reproduce_tables.main(reproduce_tables.parse_args(arguments))
    return json.loads((output_dir / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory) -> tuple[Path, dict]:
    """All parts, once."""
    folder = tmp_path_factory.mktemp("whole")
    baselines = dict(contextual_vq=problem / "vq", autoregressive=problem / "ar", vq_draft_steps=4)
    return folder, reproduce(problem, folder, **baselines)


def without_seconds(results: dict) -> dict:
    return {name: {k: v for k, v in one.items() if k != "seconds"} for name, one in results["cells"].items()}


def test_a_cell_of_a_long_run_is_that_of_a_run_of_its_own(problem, whole):
    _, results = whole
    pipe = DraftAndRevisePipeline.from_pretrained(problem / "rq")
    pipe.set_progress_bar_config(disable=True)
    network = load_feature_network(str(problem / "classifier"))
    reference = ReferenceStatistics.load(problem / "reference.npz")
    rows = [i * 30 // NUM_IMAGES for i in range(NUM_IMAGES)]
    labels = [row % NUM_CLASSES for row in rows]
    cases = {
        "random-64, M 3": dict(num_revisions=3),
        "top-c-8, M 0": dict(num_revisions=0, selection="top-c", num_inference_steps=8),
        "guidance-in-both, M 1": dict(num_revisions=1, draft_guidance_scale=1.8),
    }
    for name, changes in cases.items():
        generators = [torch.Generator().manual_seed(image_seed(0, i)) for i in range(NUM_IMAGES)]
        sampler = dict(num_inference_steps=64, num_revise_steps=2, guidance_scale=1.8, temperature=0.8)
        sampler |= dict(draft_guidance_scale=1.0, draft_temperature=1.0, selection="random")
        images = pipe(class_labels=labels, generator=generators, output_type="pt", **(sampler | changes)).images
        output = network((255 * images).round().to(torch.uint8))
        distance = frechet_distance(reference.mean, reference.covariance, *moments(output.features))
        assert results["cells"][name]["fd"] == pytest.approx(distance, rel=1e-3), name
        right = (output.logits.argmax(dim=1) == torch.tensor(labels)).double().mean().item()
        assert results["cells"][name]["accuracy"] == pytest.approx(right)


def test_a_killed_run_samples_only_what_is_missing(problem, whole, tmp_path, monkeypatch):
    folder, results = whole
    shutil.copytree(folder / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "random-8" / "0001.safetensors").unlink()
    (tmp_path / "runs" / "autoregressive" / "0002.safetensors").unlink()
    (tmp_path / "runs" / "top-c-8" / ".0000.safetensors.partial").write_bytes(b"half")
    sampled, sample = [], reproduce_tables.sample

    def counting(pipe, run, condition, generators):
        sampled.append(len(generators))
        return sample(pipe, run, condition, generators)

    monkeypatch.setattr(reproduce_tables, "sample", counting)
    flags = dict(contextual_vq=problem / "vq", autoregressive=problem / "ar", vq_draft_steps=4)
    again = reproduce(problem, tmp_path, **flags)
    assert sorted(sampled) == [2, 5]
    assert without_seconds(again) == without_seconds(results)
    assert again["claims"] == results["claims"]


def test_what_was_sampled_alone_is_scored_later(problem, whole, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="results.json"):
        reproduce(problem, tmp_path, parts=["guidance"], sample_only=True)
    monkeypatch.setattr(reproduce_tables, "sample", None)
    scored = without_seconds(reproduce(problem, tmp_path, parts=["guidance"]))
    assert len(scored) == 1 + 7 + 3 + 3 and scored.items() <= without_seconds(whole[1]).items()


def test_the_folder_of_another_run_is_refused(problem, whole):
    folder, _ = whole
    for name, value in (("seed", 1), ("dtype", "bfloat16")):
        with pytest.raises(ValueError, match=name):
            reproduce(problem, folder, parts=["guidance"], **{name: value})


def test_batches_of_an_unknown_run_are_refused(problem, whole, tmp_path):
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "no-guidance" / "run.json").unlink()
    with pytest.raises(ValueError, match="no-guidance must have a run.json.* got .*0000.safetensors without one"):
        reproduce(problem, tmp_path, parts=["guidance"])
    assert not (tmp_path / "runs" / "no-guidance" / "run.json").exists()


def test_a_damaged_batch_is_named_with_what_to_do(problem, whole, tmp_path):
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "no-guidance" / "0001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"no-guidance/0001.safetensors is damaged .*delete it, and run the same"):
        reproduce(problem, tmp_path, parts=["guidance"])


def test_a_run_says_what_made_it(problem, whole, tmp_path):
    """And not what scored it: a finished run of another device is scored here, an unfinished one not gone on with."""
    folder, results = whole
    assert results["sampled"]["device"] == ["cpu"] and results["sampled"]["clock"] == ["of the process"]
    shutil.copytree(folder / "runs", tmp_path / "runs")
    paths = sorted((tmp_path / "runs" / "no-guidance").glob("0*.safetensors"))
    tensors, made = reproduce_tables.read_batch(paths[0])
    elsewhere = {**made, "device": "cuda", "clock": "of the wall", "git_revision": "c0ffee"}
    save_file(tensors, paths[0], {"record": json.dumps(elsewhere)})
    tensors, _ = reproduce_tables.read_batch(paths[1])
    save_file(tensors, paths[1])  # as an earlier version did
    again = reproduce(problem, tmp_path, parts=["guidance"])
    assert set(again["sampled"]["device"]) == {None, "cpu", "cuda"}
    assert "c0ffee" in again["sampled"]["git_revision"] and again["scored"]["git_revision"] != "c0ffee"
    assert without_seconds(again).items() <= without_seconds(results).items()
    paths[2].unlink()
    with pytest.raises(ValueError, match="--device must be cuda, on which the batches in .*no-guidance were made"):
        reproduce(problem, tmp_path, parts=["guidance"])


def test_runs_of_earlier_versions_are_scored(problem, whole, tmp_path):
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/run.json"):
        record = json.loads(path.read_text())
        kept = {name: value for name, value in record.items() if name not in reproduce_tables.NEWLY_RECORDED}
        assert len(kept) == len(record) - (3 if path.parent.name.startswith("autoregressive") else 4)
        path.write_text(json.dumps(kept))
    again = reproduce(problem, tmp_path, parts=["guidance"])
    assert without_seconds(again).items() <= without_seconds(whole[1]).items()


def test_the_sampler_is_the_papers_whatever_limits_the_pipeline_has(problem):
    limits = dict(top_k=1, top_p=0.1)
    pipe, baseline = (reproduce_tables.load_pipeline(problem / name, "cpu") for name in ("rq", "ar"))
    limited = DraftAndRevisePipeline(pipe.vae, pipe.transformer, DraftAndReviseScheduler(**limits))
    limited_baseline = RQTransformerPipeline(baseline.vae, baseline.transformer, **limits)
    sampler = reproduce_tables.PAPER | dict(num_inference_steps=4, num_revisions=1)
    plain = dict(guidance_scale=1.0, temperature=1.0)
    for one, other, settings in ((pipe, limited, sampler), (baseline, limited_baseline, plain)):
        codes = []
        for each in (one, other):
            each.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
            run = reproduce_tables.Run("", settings)
            codes.append(reproduce_tables.sample(each, run, {"class_labels": [0, 1, 2]}, generators)[0][-1])
        assert torch.equal(*codes)


def test_the_record_of_a_run_tells_schedulers_configurations_and_tokenizers_apart(problem):
    args = SimpleNamespace(seed=0, batch_size=5, dtype="float32", protocol="torch-fidelity")
    network = load_feature_network(str(problem / "classifier"))

    def record(pipe, prompt: str) -> dict:
        return reproduce_tables.record_of(pipe, reproduce_tables.Run("", {}), {"prompt": [prompt]}, network, args)

    pipe = tiny_pipeline("text")
    before = record(pipe, "a cat at dusk")
    assert record(pipe, "a cat at dusk") == before
    assert record(pipe, "an owl")["input_ids_sha256"] != before["input_ids_sha256"]
    pipe.scheduler.register_to_config(top_k=3)
    assert {name for name, value in record(pipe, "a cat at dusk").items() if value != before[name]} == {
        "scheduler_config"
    }
    pipe.vae.register_to_config(scaling_factor=7)
    assert record(pipe, "a cat at dusk")["config_sha256"]["vae"] != before["config_sha256"]["vae"]


def test_precision_and_recall_are_against_a_random_choice_of_the_real_images(problem, whole, tmp_path):
    """Of a reference sorted by class, here of 30 far-off features and then those of the images themselves."""
    reference = ReferenceStatistics.load(problem / "reference.npz")
    near = reference.features
    far = near + 1000 * (1 + torch.arange(len(near))).unsqueeze(1)
    dataclasses.replace(reference, features=torch.cat([far, near])).save(tmp_path / "sorted.npz")
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    scored = reproduce(problem, tmp_path, parts=["guidance"], reference=tmp_path / "sorted.npz")
    assert scored["cells"]["real test images"]["recall"] > 0.2  # of the far ones none
    chosen = reproduce_tables.real_features(dataclasses.replace(reference, features=torch.arange(1000.0)), None, 100)
    assert len(chosen.unique()) == 100 and 400 < chosen.mean() < 600
    with pytest.raises(ValueError, match="--reference must hold features of 61 images, got 60"):
        reproduce_tables.real_features(ReferenceStatistics.load(tmp_path / "sorted.npz"), None, 61)


def test_every_figure_of_the_parts_is_in_the_tables(whole):
    folder, results = whole
    text = (folder / "results.md").read_text()
    for selection in ("top-c", "top-c-50%", "random"):
        for steps in (8, 64):
            for stage, m in (("draft", 0), ("revised", 2)):
                one = results["cells"][f"{selection}-{steps}, M {m}"]
                assert f"| {selection}, T_draft {steps}, {stage} | {one['fd']:.2f} ± {one['fd_se']:.2f} |" in text
    for m in range(7):
        assert f"| M {m} | {results['cells'][f'random-64, M {m}']['fd']:.2f} ±" in text
    assert all(one["claim"] in text for one in results["claims"])
    assert len(results["claims"]) == 6 + 2 + 3 + 3 + 3


def test_drafts_of_one_run_cost_less_than_their_revisions(whole):
    _, results = whole
    seconds = [results["cells"][f"random-64, M {m}"]["seconds"] for m in range(7)]
    assert seconds == sorted(seconds) and seconds[0] > 0


def shifted(offset: float, spread: float, seed: int) -> dict:
    halves = offset + spread * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    return {"fd": offset, "fd_se": halves.std().item(), "halves": {"fd": halves}}


def test_a_verdict_needs_two_standard_errors():
    better, worse = shifted(1.0, 0.1, 0), shifted(2.0, 0.1, 1)
    assert reproduce_tables.claim("", worse, better, "fd")["verdict"] == "confirmed"
    assert reproduce_tables.claim("", better, worse, "fd")["verdict"] == "contradicted"
    assert reproduce_tables.claim("", shifted(1.05, 0.1, 2), better, "fd")["verdict"] == "not decided"
    # what two cells have in common is no error of their difference
    noise = 5 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    for one in (better, worse):
        one["halves"]["fd"] = one["halves"]["fd"] + noise
    assert reproduce_tables.claim("", worse, better, "fd")["verdict"] == "confirmed"


def test_a_verdict_at_the_threshold_hangs_less_on_the_halves():
    """The ratio of a difference to its standard error is known to 1/√(2n): by 400 halves to 3.5 %."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.stack([torch.randn(reproduce_tables.NUM_HALVES, generator=generator).std() for _ in range(200)])
    assert errors.std() < 0.05


def test_the_standard_error_is_that_of_repeated_samples(monkeypatch):
    """Of a mean it is σ/√N, here as the spread of the Fréchet distance over independent samples."""
    monkeypatch.setattr(reproduce_tables, "NUM_HALVES", 100)
    generator = torch.Generator().manual_seed(0)
    mean, covariance = torch.zeros(4).double(), torch.eye(4).double()
    features = torch.randn(40, 200, 4, generator=generator).double() + 1
    labels = torch.zeros(200, dtype=torch.int64)
    real = reproduce_tables.Real(mean, covariance, torch.randn(200, 4, generator=generator).double(), labels)
    logits = torch.zeros(200, 2)
    distances = torch.tensor([frechet_distance(mean, covariance, *moments(one)) for one in features])
    stated = [reproduce_tables.cell(one, logits, real)["fd_se"] for one in features[:5]]
    assert np.mean(stated) == pytest.approx(distances.std().item(), rel=0.25)


def test_figure_1_is_drawn_from_the_results(whole, tmp_path):
    folder, _ = whole
    plot_tables.main(plot_tables.parse_args([str(folder / "results.json"), str(tmp_path / "figure.png")]))
    with Image.open(tmp_path / "figure.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 800 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_figure_1_is_not_drawn_from_another_run(whole, tmp_path):
    results = json.loads((whole[0] / "results.json").read_text())
    results["arguments"]["parts"] = ["table-3"]
    for number, other in enumerate((results, {"scores": {}})):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"with the part figure-1, and .*{path.name} is not"):
            plot_tables.main(plot_tables.parse_args([str(path), str(tmp_path / "figure.png")]))
    path.write_text(json.dumps(results)[:-20])
    with pytest.raises(ValueError, match=f"must be a JSON file, and .*{path.name} is not one"):
        plot_tables.main(plot_tables.parse_args([str(path), str(tmp_path / "figure.png")]))
    assert not (tmp_path / "figure.png").exists()


def test_bad_flags_are_named(problem, tmp_path):
    DraftAndReviseInpaintPipeline.from_pretrained(problem / "rq").save_pretrained(tmp_path / "inpaint")
    for flags, message in (
        (dict(num_images=40), "num_images"),
        (dict(num_images=4), "num_images"),
        (dict(results=tmp_path / "results.txt"), "results"),
        (dict(dataset_name="x"), "dataset_name"),
        (dict(pipeline=problem / "classifier"), "classifier"),
        (dict(pipeline=tmp_path / "inpaint"), "needs no image, got a DraftAndReviseInpaintPipeline"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            reproduce(problem, tmp_path, parts=["guidance"], **flags)
    assert not (tmp_path / "runs").exists()
