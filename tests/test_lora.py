"""LoRA: only the adapter trains, it comes back from its file, and it can be fused, taken out and left out again."""

import json
import re
import shutil

import accelerate
import datasets
import numpy as np
import pytest
import torch
import train_lora
from accelerate.state import AcceleratorState, GradientState
from claimed_device import claimed_device
from components import MAX_TEXT_LENGTH, NUM_CLASSES, random_codes, tiny_pipeline, tiny_rq_pipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from rq_draft_revise import DraftAndReviseInpaintPipeline, DraftAndRevisePipeline
from rq_draft_revise.masks import random_mask


CAPTIONS = ["a cat at dusk", "an owl in the snow", "the volcano", "rocket at night"]
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """A pipeline, and a folder of four images with captions and labels."""
    folder = tmp_path_factory.mktemp("lora")
    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        colors = random.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(colors).save(images / f"{i}.png")
        with (images / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{i}.png", "text": caption, "label": i}) + "\n")
    tiny_pipeline("text").save_pretrained(folder / "pipeline")
    tiny_pipeline("class").save_pretrained(folder / "pipeline-class")
    tiny_pipeline(None).save_pretrained(folder / "pipeline-none")
    tiny_rq_pipeline("text").save_pretrained(folder / "pipeline-baseline")
    return folder


@pytest.fixture(autouse=True)
def no_trace(tmp_path_factory, monkeypatch):
    """accelerate's state is one a process, and the script seeds the global random state."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    with torch.random.fork_rng(devices=[]):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(problem, output_dir, pipeline="pipeline", **flags):
    flags = {"max_train_steps": 60, "learning_rate": 0.02, "rank": 3, "lora_alpha": 6} | flags
    argv = ["--pretrained_model_name_or_path", str(problem / pipeline), "--train_data_dir", str(problem / "images")]
    argv += ["--output_dir", str(output_dir), "--mixed_precision", "no"]
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    train_lora.main(train_lora.parse_args(argv))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return output_dir


@pytest.fixture(scope="module")
def adapter(problem, tmp_path_factory):
    """A trained adapter's folder. The base's weights must be on the disk as before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with torch.random.fork_rng(devices=[]):
            return train(problem, tmp_path_factory.mktemp("adapter") / "mine")


def load(problem, pipeline="pipeline"):
    pipe = DraftAndRevisePipeline.from_pretrained(problem / pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    arguments = {"output_type": "latent", "generator": generators} | kwargs
    if "class_labels" not in arguments:
        arguments["prompt"] = CAPTIONS
    return pipe(**arguments).images


@torch.no_grad()
def logits_of(pipe):
    """At half of the positions of fixed codes, with fixed conditions."""
    codes = random_codes(pipe.transformer, 4)
    masked = codes.clone()
    masked[:, ::2] = pipe.transformer.mask_token_id
    ids = torch.arange(4 * pipe.transformer.prefix_length).view(4, -1) % pipe.transformer.config.text_vocab_size
    return pipe.transformer(masked, labels=codes, input_ids=ids).logits


@torch.no_grad()
def loss_on_images(problem, pipe):
    """Mean over fixed masks of the loss on the four training images."""
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "", "--train_data_dir", str(problem / "images")])
    dataset = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, split="train")
    rows, codes = train_lora.encode_images(args, dataset, pipe, "cpu")
    _, ids = train_lora.load_condition(args, dataset, pipe)
    codes, ids = codes[:, 0].long(), ids[rows]
    masks = random_mask(40, pipe.transformer.num_positions, torch.Generator().manual_seed(0))
    mask = masks.view(40, *codes.shape[1:3], 1)
    codes, ids = codes.repeat(10, 1, 1, 1), ids.repeat(10, 1)
    masked = codes.masked_fill(mask, pipe.transformer.mask_token_id)
    return pipe.transformer(masked, labels=codes, input_ids=ids).image_loss.item()


def test_an_adapter_trained_on_a_device_is_that_of_the_cpu(problem, tmp_path):
    flags = dict(max_train_steps=3, gradient_accumulation_steps=2, validation_prompt="a cat", num_validation_images=1)
    expected = load_file(train(problem, tmp_path / "cpu", **flags) / WEIGHTS)
    with claimed_device() as seen:
        adapter = load_file(train(problem, tmp_path / "device", **flags) / WEIGHTS)
    assert seen.kernels, "nothing ran there"
    assert adapter.keys() == expected.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_the_loss_falls_on_the_images_and_is_logged(problem, adapter):
    pipe = load(problem)
    before = loss_on_images(problem, pipe)
    pipe.load_lora_weights(str(adapter))
    after = loss_on_images(problem, pipe)
    assert after < 0.7 * before, (before, after)
    entries = [json.loads(line) for line in (adapter / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40, 50, 60]
    assert entries[-1]["image_loss"] < 0.7 * entries[0]["image_loss"]


def test_only_the_adapter_trains(problem, tmp_path, monkeypatch):
    """In the training script's own pipeline, before it is thrown away."""
    seen = {}

    def saved(pipe_class, folder, transformer_lora_layers, **kwargs):
        seen["layers"] = transformer_lora_layers

    def loaded(*args, **kwargs):
        seen["pipe"] = original(*args, **kwargs)
        return seen["pipe"]

    original = DraftAndRevisePipeline.from_pretrained
    monkeypatch.setattr(DraftAndRevisePipeline, "from_pretrained", loaded)
    monkeypatch.setattr(DraftAndRevisePipeline, "save_lora_weights", classmethod(saved))
    train(problem, tmp_path / "out", max_train_steps=3)
    fresh = original(problem / "pipeline")
    for name in ("vae", "transformer"):
        trained = {k.replace(".base_layer", ""): v for k, v in getattr(seen["pipe"], name).state_dict().items()}
        for key, value in getattr(fresh, name).state_dict().items():
            assert torch.equal(trained.pop(key), value), key
        assert all(".lora_" in key for key in trained)
    layers = seen["layers"]
    targets = {re.sub(r".*\.attn\.(.*)\.lora_[AB]\.weight", r"\1", key) for key in layers}
    assert targets == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(layers) == 2 * 4 * 4  # A and B, of four layers, in 2 + 2 blocks
    assert all(layer.any() for key, layer in layers.items() if "lora_B" in key), "a layer did not train"


def test_the_flags_of_the_adapter_are_its_configuration(problem):
    common = ["--pretrained_model_name_or_path", "", "--train_data_dir", "images"]
    cases = ((["--rank", "3", "--lora_alpha", "6", "--lora_dropout", "0.25"], (3, 6, 0.25)), ([], (4, 4, 0.0)))
    for flags, expected in cases:
        transformer, args = load(problem).transformer, train_lora.parse_args([*common, *flags])
        train_lora.adapt(args, transformer)
        config = transformer.peft_config["default"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == expected
    assert (args.condition_dropout, args.ema_decay, args.lr_scheduler, args.max_train_steps) == (
        0.1,
        0,
        "constant",
        500,
    )


def test_the_second_view_of_an_image_is_the_mirrored_one(problem):
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "", "--train_data_dir", "images"])
    dataset, pipe = datasets.load_dataset("imagefolder", data_dir=problem / "images", split="train"), load(problem)
    mirrored = dataset.map(lambda row: {"image": row["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)})
    _, plain = train_lora.encode_images(args, dataset, pipe, "cpu")
    _, other = train_lora.encode_images(args, mirrored, pipe, "cpu")
    args.random_flip = True
    _, both = train_lora.encode_images(args, dataset, pipe, "cpu")
    assert torch.equal(both.int(), torch.cat([plain, other], dim=1).int()) and not torch.equal(
        plain.int(), other.int()
    )


def test_a_saved_adapter_gives_the_same_codes_in_a_fresh_pipeline(problem, adapter, tmp_path):
    pipe = load(problem)
    base = draw(pipe)
    pipe.load_lora_weights(str(adapter), adapter_name="mine")
    assert pipe.get_list_adapters() == {"transformer": ["mine"]}
    adapted = draw(pipe)
    assert not torch.equal(adapted, base)
    config = pipe.transformer.peft_config["mine"]
    assert (config.r, config.lora_alpha) == (3, 6)  # alpha is not the rank: it must come from the file

    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="mine")
    metadata = pipe.transformer.peft_config["mine"].to_dict()
    DraftAndRevisePipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    fresh = load(problem)
    fresh.load_lora_weights(str(tmp_path / WEIGHTS))  # a file, or a folder as above
    assert torch.equal(draw(fresh), adapted)
    saved, again = load_file(adapter / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)


def test_fused_equals_unfused_and_unloading_restores_the_base_exactly(problem, adapter):
    pipe = load(problem)
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    base = logits_of(pipe)
    pipe.load_lora_weights(str(adapter))
    adapted, codes = logits_of(pipe), draw(pipe)
    assert (adapted - base).abs().max() > 0.1

    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    key = "blocks.0.attn.to_q"
    assert not torch.equal(pipe.transformer.get_submodule(key).base_layer.weight, before[f"{key}.weight"])
    torch.testing.assert_close(logits_of(pipe), adapted, rtol=0, atol=1e-5)
    assert torch.equal(draw(pipe), codes)

    pipe.unfuse_lora()
    torch.testing.assert_close(logits_of(pipe), adapted, rtol=0, atol=1e-5)
    pipe.disable_lora()
    torch.testing.assert_close(logits_of(pipe), base, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    assert pipe.transformer.state_dict().keys() == before.keys()

    pipe = load(problem)
    pipe.load_lora_weights(str(adapter))
    pipe.unload_lora_weights()
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())
    assert torch.equal(logits_of(pipe), base)


def test_a_pipeline_is_saved_with_an_adapter_in_its_weights_and_not_beside_them(problem, adapter, tmp_path):
    pipe = load(problem)
    pipe.load_lora_weights(str(adapter))
    codes = draw(pipe)
    for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(ValueError, match="must have no LoRA adapters"):
            save(tmp_path / "beside")
    assert not (tmp_path / "beside").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "inside")
    assert torch.equal(draw(DraftAndRevisePipeline.from_pretrained(tmp_path / "inside")), codes)


def test_half_the_scale_is_half_the_addition(problem, adapter):
    pipe = load(problem)
    weight = pipe.transformer.blocks[0].attn.to_q.weight.detach().clone()
    pipe.load_lora_weights(str(adapter), adapter_name="mine")
    layer = pipe.transformer.blocks[0].attn.to_q
    addition = layer.get_delta_weight("mine").detach().clone()
    pipe.set_adapters(["mine"], [0.5])
    pipe.fuse_lora()
    torch.testing.assert_close(layer.base_layer.weight.detach() - weight, addition / 2, rtol=0, atol=1e-5)


def test_the_card_says_what_the_adapter_is_of(problem, adapter):
    card = ModelCard((adapter / "README.md").read_text())
    assert card.data.base_model is None and "lora" in card.data.tags  # a folder, which the Hub would refuse
    assert str(problem) not in card.text and 'from_pretrained("pipeline")' in card.text
    assert "4 images of `images`" in card.text and "rank 3, 60 steps" in card.text
    assert f'pipe.load_lora_weights("{adapter.as_posix()}")' in card.text


def test_labels_one_caption_for_all_and_validation_images(problem, tmp_path):
    labelled = train(problem, tmp_path / "labels", pipeline="pipeline-class", max_train_steps=2)
    pipe = load(problem, "pipeline-class")
    pipe.load_lora_weights(str(labelled))
    assert draw(pipe, class_labels=[0, 1, 2, 3]).shape == (4, 4, 4, 3)

    flags = {"instance_prompt": "a cat", "validation_prompt": "a cat at night", "num_validation_images": 2}
    prompted = train(problem, tmp_path / "prompt", max_train_steps=2, random_flip=True, **flags)
    assert [path.name for path in prompted.glob("*.png")] == ["samples-0000002.png"]
    card = (prompted / "README.md").read_text()
    assert "with the caption *a cat*" in card and 'pipe("a cat")' in card
    assert "*a cat at night*\n\n![](samples-0000002.png)" in card
    count = sum(parameter.numel() for parameter in load(problem).transformer.parameters())
    assert f"{count:,} parameters" in card  # the base's, without the adapter that is loaded while the card is written


@pytest.mark.parametrize(
    "pipeline, flag, value, message",
    [
        ("pipeline-class", "instance_prompt", "a cat", "must be left out for a pipeline without text"),
        ("pipeline-none", "instance_prompt", "a cat", "must be left out for a pipeline without text"),
        ("pipeline-none", "validation_prompt", "a cat", "must be left out for a pipeline without a condition"),
        ("pipeline-class", "validation_prompt", "a cat", "must be the name of a class"),
        ("pipeline", "instance_prompt", " ", "must be a text"),
        ("pipeline", "mixed_precision", "fp16", "must be 'no' or 'bf16' on a CPU"),
        (
            "pipeline",
            "lora_layers",
            "to_z",
            "must be among .*, net.2, proj, text_head, to_k, to_out.0, to_q, to_v, or",
        ),
        ("pipeline", "lora_layers", "norm1", "must be among"),
        ("pipeline", "lora_layers", "attn", "must be among"),
        ("pipeline", "lora_layers", "", "must be among"),
    ],
)
def test_what_the_pipeline_or_the_machine_cannot_do_is_refused_before_the_training(
    pipeline, flag, value, message, problem, tmp_path
):
    with pytest.raises(ValueError, match=f"--{flag} {message}.* got {value!r}"):
        train(problem, tmp_path / "out", pipeline=pipeline, **{flag: value})
    assert not (tmp_path / "out").exists()


def test_one_layer_that_does_not_exist_is_refused_among_others(problem):
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "", "--train_data_dir", "images"])
    transformer = load(problem).transformer
    for given in ("to_q, to_v", "head", "blocks.0.attn.to_q,ff.net.2"):
        args.lora_layers = given
        assert len(train_lora.lora_layers(args, transformer)) == given.count(",") + 1
    args.lora_layers = "to_q,to_z"
    with pytest.raises(ValueError, match="--lora_layers .* got 'to_z'"):
        train_lora.lora_layers(args, transformer)


def test_a_pipeline_of_the_baseline_is_refused_by_its_name(problem, tmp_path):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .* a RQTransformerPipeline, in .*-baseline"):
        train(problem, tmp_path / "out", pipeline="pipeline-baseline")


def test_every_flag_is_explained_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train_lora.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"])
    for name, value in vars(args).items():
        said = f"(default: {value})" in text or f"Default: {value}," in text
        assert value in (None, "x", "y") or said, f"--{name} is not explained"


def test_the_name_of_a_class_is_drawn(problem, tmp_path):
    flags = {"validation_prompt": "class 1", "num_validation_images": 1, "max_train_steps": 1}
    out = train(problem, tmp_path / "out", pipeline="pipeline-class", **flags)
    assert Image.open(out / "samples-0000001.png").size == (8, 8)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"max_train_steps": 30}, "NaN or infinite for 10 optimizer steps in a row"),
        ({"max_train_steps": 30, "max_nonfinite_steps": 2}, "for 2 optimizer steps in a row"),
        ({"max_train_steps": 4}, "Nothing is exported: of 4 steps 1 were finite, and the loss .* checkpoint-4 has"),
        (
            {"max_train_steps": 1, "adam_weight_decay": 1e38},
            "Nothing is exported: of 1 steps 1 were finite, and a weight",
        ),
    ],
)
def test_an_adapter_that_is_not_finite_is_not_saved(flags, message, problem, tmp_path, capsys):
    with pytest.raises(RuntimeError, match=message):
        train(problem, tmp_path / "out", **({"learning_rate": 1e30} | flags))
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"train_log.jsonl", "checkpoint-4"}
    if "checkpoint-4" in message:  # the loss may have been that of bad images: who knows better, gets the weights
        train(problem, tmp_path / "out", **({"learning_rate": 1e30, "resume_from_checkpoint": "latest"} | flags))
        assert "Warning: the last loss of these weights was NaN or infinite." in capsys.readouterr().out
        assert all(layer.isfinite().all() for layer in load_file(tmp_path / "out" / WEIGHTS).values())


def test_a_step_that_is_not_finite_is_left_out_and_counted(problem, tmp_path, monkeypatch):
    """Of three steps, the second: the adapter is that of the two others, and so is the loss."""
    calls, norm = [], accelerate.Accelerator.clip_grad_norm_

    def infinite_in_the_second(self, *args, **kwargs):
        calls.append(norm(self, *args, **kwargs))
        return calls[-1] * (torch.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", infinite_in_the_second)
    out = train(problem, tmp_path / "out", max_train_steps=3, logging_steps=1)
    assert len(calls) == 3 and all(layer.isfinite().all() for layer in load_file(out / WEIGHTS).values())
    entries = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert ["image_loss" in entry for entry in entries] == [True, False, True]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 1]


def test_accumulated_micro_batches_equal_the_large_batch(problem, tmp_path):
    # Two texts of four are dropped, so that the parts have different shares in both losses. Adam's first step is the
    # sign of the gradient, which hides a wrong size: after five steps it does not.
    flags = {"max_train_steps": 5, "condition_dropout": 0.5, "lora_layers": "to_q"}
    whole = train(problem, tmp_path / "whole", train_batch_size=4, **flags)
    parts = train(problem, tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4, **flags)
    whole, parts = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=1e-4)


def test_a_resumed_run_gives_the_adapter_of_the_uninterrupted_one(problem, tmp_path):
    """To the bit, from checkpoints that hold the adapter alone, with averages and a dropout on the way to it."""
    flags = dict(max_train_steps=6, checkpointing_steps=4, lora_dropout=0.3, ema_decay=0.9, random_flip=True,
                 logging_steps=3, lr_scheduler="cosine", validation_prompt="a cat")  # fmt: skip
    whole = train(problem, tmp_path / "whole", **flags)
    checkpoint = whole / "checkpoint-4"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter.safetensors"}
    assert sum(t.numel() for t in load_file(checkpoint / "adapter.safetensors").values()) == sum(
        t.numel() for t in load_file(whole / WEIGHTS).values()
    )
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-4")
    resumed = train(problem, tmp_path / "resumed", resume_from_checkpoint="latest", **flags)
    expected, weights = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)
    names = "samples-0000006.png"
    assert (whole / names).read_bytes() == (resumed / names).read_bytes()
    with pytest.raises(ValueError, match="--rank was 3 and is 2"):
        train(problem, tmp_path / "resumed", **flags | {"resume_from_checkpoint": "latest", "rank": 2})


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_an_adapter_does_not_go_on_with_another_base(component, problem, tmp_path):
    """Whose weights the checkpoint does not hold: under the same name there may be others by now."""
    shutil.copytree(problem / "pipeline", tmp_path / "base")
    flags = dict(pipeline=tmp_path / "base", max_train_steps=2, checkpointing_steps=1)
    train(problem, tmp_path / "out", **flags)
    model = getattr(load(problem), component)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    model.save_pretrained(tmp_path / "base" / component)
    with pytest.raises(ValueError, match="the weights of --pretrained_model_name_or_path have changed"):
        train(problem, tmp_path / "out", resume_from_checkpoint=tmp_path / "out" / "checkpoint-1", **flags)


def test_an_adapter_in_the_folder_is_not_overwritten_unasked(problem, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "mine")
    before = (tmp_path / "mine" / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="--output_dir must not hold another run"):
        train(problem, tmp_path / "mine", max_train_steps=1)
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == before
    train(problem, tmp_path / "mine", max_train_steps=1, overwrite_output_dir=True)
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() != before


def test_the_log_ends_with_the_last_step(problem, tmp_path):
    for steps, logged in ((2, [2]), (5, [3, 5])):
        out = train(problem, tmp_path / str(steps), max_train_steps=steps, logging_steps=3)
        entries = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries] == logged


def test_the_card_and_the_folder_show_the_grid_of_the_run_at_hand(problem, tmp_path):
    for steps, flags in ((3, {}), (2, {"overwrite_output_dir": True})):
        train(problem, tmp_path / "out", max_train_steps=steps, validation_prompt="a cat", **flags)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["samples-0000002.png"]
    assert "![](samples-0000002.png)" in (tmp_path / "out" / "README.md").read_text()


def add_image(folder, name, damaged=False, **columns):
    """One more row of an image folder, in between by its name, as 00.png after 0.png, and in the file of captions."""
    Image.new("RGB", (8, 8), "red").save(folder / name)
    if damaged:
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    lines[1:1] = [json.dumps({"file_name": name, **columns})]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("pipeline, column", [("pipeline", "text"), ("pipeline-class", "label")])
@pytest.mark.parametrize("left_out", ["an unreadable image", "an empty", "both"])
def test_what_is_left_out_changes_no_other_image_nor_its_condition(
    left_out, pipeline, column, problem, tmp_path, capsys
):
    """The adapter is that of the good rows alone, to the bit, and what was left out is counted and named."""
    shutil.copytree(problem / "images", tmp_path / "images")
    reasons = []
    if left_out != "an empty":
        add_image(tmp_path / "images", "00.png", damaged=True, text="a cat in the snow", label=4)
        reasons.append("1 with an unreadable image")
    if left_out != "an unreadable image":
        add_image(tmp_path / "images", "10.png", text=None, label=None)
        reasons.insert(0, f"1 with an empty {column!r}")
    flags = {"pipeline": pipeline, "max_train_steps": 3, "condition_dropout": 0, "random_flip": True}
    expected = load_file(train(problem, tmp_path / "good", **flags) / WEIGHTS)
    capsys.readouterr()
    output_dir = train(problem, tmp_path / "all", train_data_dir=tmp_path / "images", **flags)
    printed = capsys.readouterr().out
    weights = load_file(output_dir / WEIGHTS)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)
    assert f"images: 4 training; skipped rows: {', '.join(reasons)}\n" in printed
    assert ("00.png: UnidentifiedImageError) of split 'train'" in printed) == (left_out != "an empty")
    assert (f"Skipped: an empty {column!r}, row " in printed) == (left_out != "an unreadable image")
    assert "4 images of `images`" in (output_dir / "README.md").read_text()


def test_a_caption_for_all_needs_no_column_of_captions(problem, tmp_path, capsys):
    shutil.copytree(problem / "images", tmp_path / "images")
    add_image(tmp_path / "images", "10.png", text=None, label=None)
    flags = {"train_data_dir": tmp_path / "images", "instance_prompt": "a cat", "max_train_steps": 1}
    train(problem, tmp_path / "out", **flags)
    assert "images: 5 training; skipped rows: none\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "columns, damaged, message",
    [
        ({"text": "a cat"}, True, "'image' has no readable image"),
        ({"text": " "}, False, "Column 'text' must have values, but all 2 rows are empty"),
    ],
)
def test_images_of_which_none_is_left_are_refused(columns, damaged, message, problem, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("0.png", "1.png"):
        add_image(tmp_path / "images", name, damaged, **columns)
    with pytest.raises(ValueError, match=message):
        train(problem, tmp_path / "out", train_data_dir=tmp_path / "images")


@pytest.mark.parametrize(
    "pipeline, columns, message",
    [
        ("pipeline-class", {"label": [1, NUM_CLASSES]}, rf"--label_column .* {NUM_CLASSES - 1}\], .* {NUM_CLASSES}"),
        ("pipeline-class", {"label": [1, -1]}, "--label_column .* got -1"),
        ("pipeline", {"text": [7, 8]}, "--caption_column must hold texts, got 7"),
    ],
)
def test_what_is_no_condition_of_the_transformer_is_refused(pipeline, columns, message, problem):
    """Such as the null class, which guidance takes for no class at all."""
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "", "--train_data_dir", "images"])
    with pytest.raises(ValueError, match=message):
        train_lora.load_condition(args, datasets.Dataset.from_dict(columns), load(problem, pipeline))


def test_captions_that_are_cut_are_counted(problem, capsys):
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "", "--train_data_dir", "images"])
    fitting, long = "a cat at night in the", "a cat at night in the snow"
    captions = datasets.Dataset.from_dict({"text": ["a cat", fitting, long]})
    _, ids = train_lora.load_condition(args, captions, load(problem))
    assert ids.shape == (3, MAX_TEXT_LENGTH)
    printed = capsys.readouterr().out
    assert f"1 of 3 captions of which the model reads the first {MAX_TEXT_LENGTH} tokens, such as {long!r}" in printed


def test_classes_are_those_of_the_pipeline_by_their_names(problem, capsys):
    pipe = load(problem, "pipeline-class")
    args = train_lora.parse_args(["--pretrained_model_name_or_path", "", "--train_data_dir", "images"])
    names = [pipe.config.id2label[i].split(",")[0] for i in (3, 1)]
    features = datasets.Features({"label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"label": [0, 1, 0]}, features=features)
    assert train_lora.load_condition(args, rows, pipe)[1].tolist() == [3, 1, 3]
    assert f"{names[0]!r} is class 3" in capsys.readouterr().out


def test_every_pipeline_takes_adapters():
    for pipe in (
        tiny_pipeline("class"),
        tiny_rq_pipeline("class"),
        DraftAndReviseInpaintPipeline(**tiny_pipeline("class").components),
    ):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.unload_lora_weights()
        pipe.load_lora_weights({f"transformer.{key}": value for key, value in layers.items()})
        assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("state_dict", [{}, {"transformer.blocks.0.attn.to_q.weight": torch.ones(2, 2)},
                                        {"unet.to_q.lora_A.weight": torch.ones(2, 2)}])  # fmt: skip
def test_what_is_no_adapter_is_refused_and_changes_nothing(state_dict):
    pipe = tiny_pipeline("class")
    before = pipe.transformer.state_dict().keys()
    with pytest.raises(ValueError, match="must hold LoRA weights by names that begin with 'transformer.'"):
        pipe.load_lora_weights(state_dict)
    assert pipe.transformer.state_dict().keys() == before


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`transformer_lora_layers` must not be empty"):
        DraftAndRevisePipeline.save_lora_weights(tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_two_sources_of_images_are_refused():
    argv = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", "--dataset_name", "z"]
    with pytest.raises(ValueError, match="only one of --dataset_name and --train_data_dir, got 'z' and 'y'"):
        train_lora.parse_args(argv)


@pytest.mark.parametrize("flag, value", [("rank", 0), ("max_train_steps", 0), ("condition_dropout", 1.0),
                                         ("max_nonfinite_steps", 0), ("learning_rate", -1.0), ("adam_beta1", 1.0),
                                         ("lora_dropout", 1.0), ("seed", -1)])  # fmt: skip
def test_impossible_flags_are_refused_by_name(flag, value):
    argv = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", f"--{flag}", str(value)]
    with pytest.raises(ValueError, match=f"--{flag} must .* got {value}"):
        train_lora.parse_args(argv)
