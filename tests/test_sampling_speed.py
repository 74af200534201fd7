"""Speed is designed in: the fast sampler computes what the naive one does, and nothing that it throws away."""

import json

import components
import flops
import limits
import pytest
import sampling
import torch
from naive_sampler import naive_draft_and_revise
from torch.utils.flop_counter import FlopCounterMode

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerModel,
)
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


def meta_rq_transformer(condition, code_depth=4):
    kinds = {"class": dict(num_classes=10), "text": dict(text_vocab_size=500, max_text_length=12), None: {}}
    with torch.device("meta"):
        return RQTransformerModel(
            code_depth=code_depth,
            codebook_size=1024,
            num_spatial_layers=4,
            num_depth_layers=2,
            num_attention_heads=8,
            dropout=0.0,
            null_condition=condition is not None,
            **kinds[condition],
        )


def meta_condition(config, rows):
    if config.num_classes is not None:
        return dict(class_labels=torch.zeros(rows, dtype=torch.int64, device="meta"))
    if config.text_vocab_size is not None:
        return dict(input_ids=torch.zeros(rows, config.max_text_length, dtype=torch.int64, device="meta"))
    return {}


@pytest.mark.parametrize("code_depth", [1, 4])
@pytest.mark.parametrize("condition,guided", [("class", False), ("class", True), ("text", True), (None, False)])
def test_an_autoregressive_image_costs_its_analytic_count(condition, guided, code_depth):
    transformer, batch_size = meta_rq_transformer(condition, code_depth), 3
    config, rows, positions = transformer.config, batch_size * (1 + guided), transformer.num_positions
    codes = torch.zeros(batch_size, 8, 8, code_depth, dtype=torch.int64, device="meta")
    arguments = meta_condition(config, rows)
    with torch.no_grad():
        caches = []
        count = counted(lambda: caches.append(transformer(**arguments or dict(codes=codes)).past_key_values))
        arguments |= dict(
            codes=codes,
            position=torch.zeros(1, dtype=torch.int64, device="meta"),
            uniforms=torch.zeros(batch_size, code_depth, device="meta"),
            past_key_values=caches[0],
        )
        if guided:
            arguments["guidance_scale"] = torch.tensor(2.0, device="meta")
        count += positions * counted(lambda: transformer(**arguments))  # all steps are of one shape
    expected = flops.autoregressive_prefix(config, rows)
    expected += sum(flops.autoregressive_step(config, batch_size, position, guided) for position in range(positions))
    # computed is up to 2 % more: each step attends to the empty slots of the cache too
    assert expected <= count == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("code_depth", [1, 4])
@pytest.mark.parametrize("condition", ["class", "text", None])
def test_an_autoregressive_training_step_costs_its_analytic_count(condition, code_depth):
    transformer, batch_size = meta_rq_transformer(condition, code_depth), 3
    labels = torch.zeros(batch_size, 8, 8, code_depth, dtype=torch.int64, device="meta")
    condition = meta_condition(transformer.config, batch_size)
    count = counted(lambda: transformer(labels=labels, **condition).loss.backward())
    expected = flops.autoregressive_teacher_forcing(transformer.config, batch_size, trained=True)
    assert count == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("condition,scale", [("class", 1.0), ("class", 1.7), ("text", 1.7), (None, 1.0)])
def test_the_parts_of_a_run_are_all_that_it_computes(condition, scale):
    pipe, batch_size = components.tiny_pipeline(condition), 2
    pipe.scheduler = DraftAndReviseScheduler(5, 3, 2, guidance_scale=scale)  # blocks of 3 and 4, of 5 and 6 positions
    arguments = dict(num_images_per_prompt=batch_size)
    if condition == "class":
        arguments = dict(class_labels=[0, 1])
    elif condition == "text":
        arguments = dict(prompt=["a cat", "an owl"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        count = counted(lambda: pipe(**arguments, output_type="latent"))
    parts = limits.draft_and_revise_parts(pipe.transformer, pipe.scheduler.config, batch_size, 5)
    assert sum(part.times * part.flops for part in parts) == pytest.approx(count, rel=0.02)


def test_no_bound_is_below_what_operations_or_bytes_alone_take():
    transformer, scheduler = components.tiny_transformer(), DraftAndReviseScheduler().config
    for rate, bandwidth in ((1e12, 1e9), (1e9, 1e12), (1e9, 1e9)):
        parts = limits.draft_and_revise_parts(transformer, scheduler, 4, num_inference_steps=16)
        seconds = limits.least_seconds(parts, rate, bandwidth)
        alone = seconds["operations"], seconds["bytes"]
        assert max(alone) <= seconds["least"] <= sum(alone)


def test_the_benchmark_sets_three_models_side_by_side(tmp_path, capsys):
    pipes = dict(autoregressive=components.tiny_rq_pipeline("class"))
    for name, code_depth in (("deep", 3), ("flat", 1)):
        vae = components.tiny_vae(code_depth=code_depth)
        transformer = components.tiny_transformer("class", vae=vae)
        pipes[name] = DraftAndRevisePipeline(vae, transformer, DraftAndReviseScheduler(16, 2, 1))
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in pipes]
    arguments = ["--dtypes", "float32", "--modes", "eager", "--batch_sizes", "2", "--runs", "1"]
    sampling.main(["--pipelines", *folders, *arguments, "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    cases = {(row["pipeline"], row["num_inference_steps"]): row for row in report["cases"]}
    assert set(cases) == {("deep", 16), ("deep", 8), ("flat", 16), ("autoregressive", 16)}
    for row in cases.values():
        assert row["seconds_per_image"] > 0 and row["decode_seconds_per_image"] > 0
        assert 0 < row["share_of_limit"] < 1
    verdicts = {row["law"][:3]: row["verdict"] for row in report["laws"]}
    assert verdicts["(a)"] in ("PASS", "FAIL") and verdicts["(b)"] in ("PASS", "FAIL")
    assert verdicts["(c)"] == "not measured"  # there is no accelerator
    assert "(b) time over FLOP share" in capsys.readouterr().out
