"""The config folders of `pipelines/` are the published models, and their cards and class names say what they are."""

import functools
import importlib
import inspect
import json
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from components import tiny_pipeline, tiny_rq_transformer, tiny_vae

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerModel,
    RQTransformerPipeline,
    RQVAEModel,
)


PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"

# Table 1's sizes, counted exactly, without the null condition; (T_draft, T_revise, M, guidance) of the paper.
TABLE_1 = {
    "imagenet-256-371m": (371_111_168, (64, 2, 3, 1.4)),
    "imagenet-256-821m": (820_899_584, (64, 2, 2, 1.8)),
    "imagenet-256-1.4b": (1_387_529_984, (64, 2, 2, 2.0)),
    "imagenet-256-vq-350m": (371_041_536, (256, 2, 2, 2.4)),
    "cc3m-256-366m": (365_903_104, (64, 4, 2, 1.1)),
    "cc3m-256-654m": (654_061_824, (64, 4, 2, 1.1)),
}
# the autoregressive baseline, whose sizes tests/test_rq_transformer.py asserts
BASELINE = sorted(path.name for path in PIPELINES.glob("rq-*"))
IMAGENET = sorted(path.name for path in PIPELINES.glob("*imagenet-256-*"))

every_folder = pytest.mark.parametrize("name", [*TABLE_1, *BASELINE])


@functools.cache
def on_meta(cls, folder):
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder))


def transformer_of(name):
    cls = RQTransformerModel if name in BASELINE else ContextualRQTransformerModel
    return on_meta(cls, PIPELINES / name / "transformer")


def model_index(name) -> dict:
    return json.loads((PIPELINES / name / "model_index.json").read_text(encoding="utf-8"))


def count(model) -> int:
    """Without the codebook, a buffer that belongs to the RQ-VAE."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---- configs


@pytest.mark.parametrize("name", TABLE_1)
def test_parameters_and_sampler_of_table_1(name):
    expected, sampler = TABLE_1[name]
    transformer = transformer_of(name)
    # the codebook is a buffer, which Table 1 does not count; the null condition is one row of the embedding
    assert count(transformer) - transformer.condition_embedding.embedding_dim == expected

    config = DraftAndReviseScheduler.from_pretrained(PIPELINES / name / "scheduler").config
    assert (
        config.num_inference_steps,
        config.num_revise_steps,
        config.num_revisions,
        config.guidance_scale,
    ) == sampler
    assert (config.temperature, config.draft_temperature, config.draft_guidance_scale) == (0.8, 1.0, 1.0)
    assert config.selection == "random"

    vae = on_meta(RQVAEModel, PIPELINES / name / "vae")
    size = vae.config.sample_size // vae.spatial_scale_factor
    assert (size, size, vae.config.code_depth) == tuple(
        transformer.config[key] for key in ("height", "width", "code_depth")
    )
    assert vae.quantizer.codebook.shape == transformer.codebook.shape
    if vae.config.code_depth == 4:
        # the codebook counted once, with its padding row; its moving averages are training state
        assert count(vae) + vae.quantizer.codebook.numel() == 104_402_051


def test_the_vq_model_drafts_one_position_a_step():
    config = transformer_of("imagenet-256-vq-350m").config
    scheduler = DraftAndReviseScheduler.load_config(PIPELINES / "imagenet-256-vq-350m" / "scheduler")
    assert (config.height, config.width, config.code_depth) == (16, 16, 1)
    assert scheduler["num_inference_steps"] == config.height * config.width


@every_folder
def test_configs_have_no_key_that_their_class_does_not_know(name):
    """diffusers passes over a key it does not know, so a misspelt one would be its default."""
    transformer = RQTransformerModel if name in BASELINE else ContextualRQTransformerModel
    classes = {"vae": RQVAEModel, "transformer": transformer, "scheduler": DraftAndReviseScheduler}
    for component, cls in classes.items():
        folder = PIPELINES / name / component
        if component == "scheduler" and name in BASELINE:
            assert not folder.exists()
            continue
        config = cls.load_config(folder)
        assert config["_class_name"] == cls.__name__
        known = inspect.signature(cls.__init__).parameters
        assert {key for key in config if not key.startswith("_")} <= set(known), component


def test_model_indexes_name_the_frozen_module_paths():
    indexes = {path.parent.name: json.loads(path.read_text()) for path in PIPELINES.glob("*/model_index.json")}
    baselines = {name for name, index in indexes.items() if index["_class_name"] == "RQTransformerPipeline"}
    assert set(BASELINE) <= baselines
    for name, index in indexes.items():
        assert index["vae"] == ["rq_draft_revise.rqvae", "RQVAEModel"], name
        if name in baselines:
            assert index["transformer"] == ["rq_draft_revise.rq_transformer", "RQTransformerModel"], name
            assert "scheduler" not in index, name
            continue
        assert index["_class_name"] == "DraftAndRevisePipeline", name
        assert index["transformer"] == ["rq_draft_revise.contextual_rq_transformer", "ContextualRQTransformerModel"]
        assert index["scheduler"] == ["rq_draft_revise.scheduling_draft_and_revise", "DraftAndReviseScheduler"], name
    assert len(indexes) - len(baselines) >= len(TABLE_1)


# ---- names of the classes

# of the known order of ILSVRC-2012, sorted by WordNet's numbers
KNOWN = {
    0: "tench",
    1: "goldfish",
    151: "Chihuahua",
    207: "golden retriever",
    281: "tabby",
    388: "giant panda",
    404: "airliner",
    440: "beer bottle",
    526: "desk",
    609: "jeep",
    751: "racer",
    817: "sports car",
    924: "guacamole",
    954: "banana",
    980: "volcano",
    985: "daisy",
    999: "toilet tissue",
}


def class_model(name):
    """A pipeline of the folder's kind with its `id2label` and tiny models of 1,000 classes."""
    id2label = model_index(name)["id2label"]
    if name not in BASELINE:
        pipe = tiny_pipeline("class", num_classes=1000)
        return DraftAndRevisePipeline(pipe.vae, pipe.transformer, pipe.scheduler, id2label=id2label)
    vae = tiny_vae()
    return RQTransformerPipeline(vae, tiny_rq_transformer("class", vae=vae, num_classes=1000), id2label=id2label)


def test_the_imagenet_folders_name_the_same_1000_classes_and_others_none():
    assert len(IMAGENET) == 8
    names = model_index(IMAGENET[0])["id2label"]
    assert list(names) == [str(i) for i in range(1000)]
    assert all(re.fullmatch(r"[\w.'/-]+(,? [\w.'/-]+)*", name) for name in names.values())
    assert len(set(names.values())) == 1000
    for name in [*TABLE_1, *BASELINE]:
        assert model_index(name)["id2label"] == (names if name in IMAGENET else None), name
        assert transformer_of(name).config.num_classes == (1000 if name in IMAGENET else None), name


@pytest.mark.parametrize("name", ["imagenet-256-821m", "rq-imagenet-256-821m"])
def test_a_class_is_found_by_each_of_its_names_or_its_candidates_are_said(name):
    pipe = class_model(name)
    assert pipe.get_label_ids("volcano") == [980] and pipe.get_label_ids("golden retriever") == [207]
    assert pipe.get_label_ids(list(KNOWN.values())) == list(KNOWN)
    assert pipe.get_label_ids(" Tinca TINCA ") == [0]

    owners, entries = defaultdict(set), {}
    for label, entry in pipe.config.id2label.items():
        entries[entry.lower()] = label
        for alternative in entry.lower().split(","):
            owners[alternative.strip()].add(label)
    # the whole entry of a class is that class, whoever else is called so
    meant = {name: entries.get(name, min(labels)) for name, labels in owners.items()}
    refused = {name for name, labels in owners.items() if len(labels) > 1 and name not in entries}
    clear = [name for name in owners if name not in refused]
    assert pipe.get_label_ids(clear) == [meant[name] for name in clear]
    assert {meant[name] for name in clear} == set(range(1000))  # no class without a name of its own
    for name in refused:
        with pytest.raises(ValueError, match=re.escape(repr(name))) as error:
            pipe.get_label_ids(["volcano", name])
        assert all(f"{label} ({pipe.config.id2label[label]!r})" in str(error.value) for label in owners[name])
    assert {"crane", "panda", "gong"} <= refused and len(refused) < 20
    assert pipe.get_label_ids(["crane bird", "construction crane", "harp", "red panda"]) == [134, 517, 594, 387]


@pytest.mark.parametrize("name", ["imagenet-256-vq-350m", "rq-imagenet-256-1.4b"])
def test_class_names_survive_saving_and_draw(name, tmp_path):
    class_model(name).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["id2label"] == model_index(name)["id2label"]
    cls = RQTransformerPipeline if name in BASELINE else DraftAndRevisePipeline
    pipe = cls.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.id2label[980] == "volcano"
    by_name, by_id = (
        pipe(class_labels=label, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for label in ("volcano", 980)
    )
    assert torch.equal(by_name, by_id)


# ---- cards


def card_of(name) -> str:
    return (PIPELINES / name / "README.md").read_text(encoding="utf-8")


def rows_of(text) -> dict[str, list[str]]:
    """The rows of all tables of a page, by their first cell without its markup."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {re.sub(r"`\]\(.*\)|\[?`", "", first): rest for first, *rest in rows}


def integers(cell) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", cell)]


@every_folder
def test_a_card_describes_its_configs(name):
    transformer, vae = transformer_of(name), on_meta(RQVAEModel, PIPELINES / name / "vae")
    config, rows = transformer.config, rows_of(card_of(name))
    assert sum(integers(rows["parameters"][0])) == count(transformer)
    assert integers(rows["parameters of the RQ-VAE"][0]) == [count(vae), vae.quantizer.codebook.numel()]
    heads = (config.num_attention_heads, config.attention_head_dim)
    assert integers(rows["width"][0]) == [heads[0] * heads[1], *heads]
    assert integers(rows["blocks"][0]) == [config.num_spatial_layers, config.num_depth_layers]
    pixels = (vae.config.sample_size,) * 2
    assert integers(rows["codes"][0]) == [config.height, config.width, config.code_depth, *pixels]
    assert integers(rows["codebook"][0])[:2] == [config.codebook_size, config.codebook_dim]
    condition = [config.max_text_length, config.text_vocab_size] * (config.text_vocab_size is not None)
    condition += [config.num_classes] * (config.num_classes is not None)
    if condition:
        assert integers(rows["condition"][0]) == [*condition, transformer.prefix_length]
    else:
        assert rows["condition"][0].startswith("none")

    (page_row,) = [row for folder, row in rows_of((PIPELINES / "README.md").read_text()).items() if folder == name]
    assert integers(page_row[-1]) == integers(rows["parameters"][0])[:1]
    assert integers(page_row[1]) == [config.height, config.width, config.code_depth]
    assert integers(page_row[2]) == [config.num_spatial_layers, config.num_depth_layers]
    assert integers(page_row[3]) == [heads[0] * heads[1]]


@every_folder
def test_a_card_has_the_defaults_of_sampling(name):
    if name in BASELINE:
        defaults = {key: model_index(name)[key] for key in ("guidance_scale", "temperature", "top_k", "top_p")}
    else:
        config = DraftAndReviseScheduler.load_config(PIPELINES / name / "scheduler")
        defaults = {key: value for key, value in config.items() if not key.startswith("_")}
    table = {key: row[-1].strip("`") for key, row in rows_of(card_of(name)).items() if key in defaults}
    assert table == {key: "none" if value is None else str(value) for key, value in defaults.items()}


@every_folder
def test_a_card_says_what_there_is_to_know(name):
    card = card_of(name)
    _, header, text = card.split("---\n", 2)
    task = "text-to-image" if transformer_of(name).config.text_vocab_size else "unconditional-image-generation"
    for line in ("license: apache-2.0", "library_name: rq_draft_revise", f"pipeline_tag: {task}", "tags:"):
        assert line in header.splitlines()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    training = "Use and training" if name in BASELINE and task == "text-to-image" else "Training"
    assert headings == [
        "Architecture",
        "Sampling",
        training,
        "Published figures",
        "Bias, risks, data",
        "Licence",
    ]
    assert "**A configuration without weights" in re.sub(r"\s+", " ", text)
    assert "**Published by the authors, not reproduced here.**" in text
    assert f"pipelines/{name}" in text
    for link in re.findall(r"\]\((\.\.[^)]*)\)", text):
        assert (PIPELINES / name / link).exists(), link
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, name, "exec")
        for imported in re.findall(r"from rq_draft_revise import (.*)", snippet):
            assert all(hasattr(importlib.import_module("rq_draft_revise"), part) for part in imported.split(", "))


@every_folder
def test_the_commands_of_a_card_are_accepted_by_the_scripts(name):
    blocks = re.findall(r"```bash\n(.*?)```", card_of(name), re.DOTALL)
    if not blocks:  # the baseline's text models show the loop instead
        assert "loss = transformer(labels=" in card_of(name)
        return
    parsed = {}
    for line in blocks[0].replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        script = next(word for word in words if word.endswith(".py"))
        parse_args = importlib.import_module(Path(script).stem).parse_args
        parsed[Path(script).stem] = parse_args(words[words.index(script) + 1 :])
    first = parsed["train_rqvae"]
    second = parsed.get("train_cc3m") or parsed["train_imagenet"]
    assert first.vae_config == f"pipelines/{name}/vae"
    assert second.pretrained_model_name_or_path == f"pipelines/{name}"
    assert second.vae == first.output_dir  # the first stage writes what the second reads
    if transformer_of(name).config.text_vocab_size is not None:
        assert second.tokenizer == parsed["train_tokenizer"].output_dir
    else:
        assert second.model == ("autoregressive" if name in BASELINE else "contextual")
    assert f'from_pretrained("{second.output_dir}")' in card_of(name)
