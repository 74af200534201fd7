"""Speed is designed in: the fast sampler computes what the naive one does, and nothing that it throws away."""

import components
import flops
import pytest
import torch
from naive_sampler import naive_draft_and_revise
from torch.utils.flop_counter import FlopCounterMode

from rq_draft_revise import ContextualRQTransformerModel, DraftAndReviseScheduler
from rq_draft_revise.conditions import condition_ids


@pytest.mark.parametrize("condition", ["class", "text", None])
def test_fast_sampler_equals_the_naive_one(condition):
    scale = 1.0 if condition is None else 1.7
    pipe = components.tiny_pipeline(condition)
    guidance = dict(guidance_scale=scale, draft_guidance_scale=scale)
    pipe.scheduler = DraftAndReviseScheduler(5, 3, 2, temperature=0.7, **guidance)
    transformer, scheduler = pipe.transformer, pipe.scheduler

    arguments, naive, null = {}, {}, {}
    if condition == "class":
        arguments, naive = dict(class_labels=[2, 0]), dict(class_labels=torch.tensor([2, 0]))
    if condition == "text":
        prompts = ["a volcano at dusk", "a cat"]
        arguments, naive = dict(prompt=prompts), condition_ids(transformer, pipe.tokenizer, prompt=prompts)
    for name, value in naive.items():
        null[name] = torch.full_like(value, transformer.null_condition_id)

    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    latents = None if condition is not None else pipe.prepare_latents(2)
    fast = pipe(**arguments, latents=latents, generator=generators, output_type="latent").images

    scheduler.set_timesteps()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    slow = naive_draft_and_revise(transformer, scheduler, pipe.prepare_latents(2), naive, null, generators)
    assert torch.equal(fast, slow)


def meta_transformer(condition, code_depth=4):
    """Wide enough for attention to be a small part, as in the real models; nothing is computed on the meta device."""
    kinds = {"class": dict(num_classes=10), "text": dict(text_vocab_size=500, max_text_length=12), None: {}}
    with torch.device("meta"):
        return ContextualRQTransformerModel(
            code_depth=code_depth,
            codebook_size=1024,
            num_spatial_layers=4,
            num_depth_layers=2,
            num_attention_heads=4,
            dropout=0.0,
            **kinds[condition],
        )


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("code_depth", [1, 4])
@pytest.mark.parametrize("condition", ["class", "text", None])
@pytest.mark.parametrize("block_size,guided", [(1, False), (32, True)], ids=["draft step", "guided revise step"])
def test_a_sampling_step_costs_its_analytic_count(condition, block_size, guided, code_depth):
    if guided and condition is None:
        guided = False
    transformer, batch_size = meta_transformer(condition, code_depth), 3
    config, rows = transformer.config, batch_size * (1 + guided)
    arguments = dict(
        codes=torch.zeros(batch_size, 8, 8, code_depth, dtype=torch.int64, device="meta"),
        positions=torch.zeros(batch_size, block_size, dtype=torch.int64, device="meta"),
        uniforms=torch.zeros(batch_size, block_size, code_depth, device="meta"),
    )
    if condition is not None:
        shape = (config.num_spatial_layers, 2, rows, transformer.prefix_length, 4, 64)
        arguments["prefix_key_values"] = torch.zeros(shape, device="meta")
    if guided:
        arguments["guidance_scale"] = torch.tensor(2.0, device="meta")
    with torch.no_grad():
        count = counted(lambda: transformer(**arguments))
    assert count == pytest.approx(flops.sampling_step(config, batch_size, block_size, guided), rel=0.02)


@pytest.mark.parametrize("condition", ["class", "text", None])
def test_a_training_step_costs_its_analytic_count(condition):
    transformer, batch_size = components.tiny_transformer(condition, num_attention_heads=2, attention_head_dim=64), 4
    config = transformer.config
    positions = transformer.num_positions
    labels = torch.randint(config.codebook_size, (batch_size, config.height, config.width, config.code_depth))
    num_masked = [1, 3, positions // 2, positions]
    codes = labels.clone().flatten(1, 2)
    for row, number in enumerate(num_masked):
        codes[row, :number] = transformer.mask_token_id
    arguments = dict(codes=codes.view_as(labels), labels=labels)
    if condition == "class":
        arguments["class_labels"] = torch.zeros(batch_size, dtype=torch.int64)
    if condition == "text":
        arguments["input_ids"] = torch.zeros(batch_size, config.max_text_length, dtype=torch.int64)

    expected = flops.teacher_forcing(config, batch_size, sum(num_masked), trained=True)
    # depth blocks and head on all positions would be far outside of the tolerance
    everything = flops.teacher_forcing(config, batch_size, batch_size * positions, trained=True)
    assert everything > 1.1 * expected
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        count = counted(lambda: transformer(**arguments).loss.backward())
    assert count == pytest.approx(expected, rel=0.02)
