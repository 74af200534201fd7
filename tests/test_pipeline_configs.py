"""The config folders of `pipelines/` are the models of the paper's Table 1."""

import json
from pathlib import Path

import pytest
import torch

from rq_draft_revise import ContextualRQTransformerModel, DraftAndReviseScheduler, RQVAEModel


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


def on_meta(cls, folder):
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder))


@pytest.mark.parametrize("name", TABLE_1)
def test_parameters_and_sampler_of_table_1(name):
    expected, sampler = TABLE_1[name]
    transformer = on_meta(ContextualRQTransformerModel, PIPELINES / name / "transformer")
    # the codebook is a buffer, which Table 1 does not count; the null condition is one row of the embedding
    null = transformer.condition_embedding.embedding_dim
    assert sum(parameter.numel() for parameter in transformer.parameters()) - null == expected

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
        parameters = sum(parameter.numel() for parameter in vae.parameters()) + vae.quantizer.codebook.numel()
        assert parameters == 104_402_051


def test_model_indexes_name_the_frozen_module_paths():
    # the baseline's have a test of their own
    paths = [path for path in PIPELINES.glob("*/model_index.json") if not path.parent.name.startswith("rq-")]
    for path in paths:
        index = json.loads(path.read_text())
        assert index["_class_name"] == "DraftAndRevisePipeline", path
        assert index["vae"] == ["rq_draft_revise.rqvae", "RQVAEModel"], path
        assert index["transformer"] == ["rq_draft_revise.contextual_rq_transformer", "ContextualRQTransformerModel"]
        assert index["scheduler"] == ["rq_draft_revise.scheduling_draft_and_revise", "DraftAndReviseScheduler"], path
    assert len(paths) >= len(TABLE_1)
