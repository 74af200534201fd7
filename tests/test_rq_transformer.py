"""The autoregressive baseline: what a prediction may depend on, and that cached sampling inverts teacher forcing."""

import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from components import (
    CONDITIONS,
    MAX_TEXT_LENGTH,
    SIZES,
    random_codes,
    random_condition,
    tiny_rq_pipeline,
    tiny_rq_transformer,
    tiny_vae,
)
from torch._dynamo.utils import counters

import rq_draft_revise
from rq_draft_revise import RQTransformerModel, RQTransformerPipeline, RQVAEModel
from rq_draft_revise.conditions import condition_ids


PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"
# (code_depth, num_depth_layers, learned_code_embedding); the last is VQ-GAN's transformer
SHAPES = [(3, 2, False), (1, 2, False), (1, 0, False), (1, 0, True)]

conditions = pytest.mark.parametrize("condition", CONDITIONS)


def tiny(condition="class", code_depth=3, **config) -> RQTransformerModel:
    """With 2×3 positions."""
    return tiny_rq_transformer(condition, code_depth, **{"height": 2, "width": 3, **config})


def tiny_pipeline(*args, **kwargs) -> RQTransformerPipeline:
    pipe = tiny_rq_pipeline(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def null_like(model, condition: dict) -> dict:
    return {name: torch.full_like(value, model.null_condition_id) for name, value in condition.items()}


def random_uniforms(model, batch_size=2, seed=0) -> torch.Tensor:
    shape = (batch_size, model.num_positions, model.config.code_depth)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(model, uniforms, condition, **sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole image by cached steps: codes and log-probabilities `(B, N)`."""
    codes = torch.full_like(random_codes(model, len(uniforms)), model.mask_token_id)
    if sampling.get("guidance_scale") is not None:
        null = null_like(model, condition)
        condition = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
    cache = model(**(condition or {"codes": codes})).past_key_values
    log_probs = []
    for n in range(model.num_positions):
        output = model(codes, torch.tensor([n]), uniforms[:, n], past_key_values=cache, **condition, **sampling)
        codes.flatten(1, 2)[:, n] = output.stacks
        log_probs.append(output.log_probs)
    return codes, torch.stack(log_probs, dim=1)


def naive_distribution(logits: np.ndarray, temperature, top_k, top_p) -> np.ndarray:
    """`(K,)` in float64: softmax, the `top_k` largest, of those the smallest set of mass `top_p`."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights, kind="stable")
    if top_k is not None:
        weights[order[top_k:]] = 0
    weights /= weights.sum()
    if top_p is not None:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= top_p]] = 0
    return weights / weights.sum()


@torch.no_grad()
def naive_sample(model, uniforms, condition, guidance_scale=None, temperature=1.0, top_k=None, top_p=None):
    """The oracle: for every single code it runs the whole model on the whole image, twice with guidance."""
    depth = model.config.code_depth
    top_k, top_p = (value if isinstance(value, list) else [value] * depth for value in (top_k, top_p))
    labels = random_codes(model, len(uniforms), seed=99)  # what is not known yet is anything
    log_probs = torch.zeros(uniforms.shape[:2], dtype=torch.float64)
    for n, d in itertools.product(range(model.num_positions), range(depth)):
        logits = model(labels=labels, **condition).logits[:, n, d].double()
        if guidance_scale is not None:
            null = model(labels=labels, **null_like(model, condition)).logits[:, n, d].double()
            logits = null + guidance_scale * (logits - null)
        for row in range(len(labels)):
            weights = naive_distribution(logits[row].numpy(), temperature, top_k[d], top_p[d])
            code = int(np.searchsorted(np.cumsum(weights), float(uniforms[row, n, d]), side="right"))
            labels.flatten(1, 2)[row, n, d] = code
            log_probs[row, n] += np.log(weights[code])
    return labels, log_probs


# ---- sizes

# Exact counts beside the published names. All names are rounded to the nearest million or tenth of a billion, but one:
# 480,921,088 is called 480M. The authors published no config of the 3.9B model outside of its archive: here it is the
# 3.8B model with a text of 64 tokens in place of a class (with 32 tokens it has 3,903,915,008).
PUBLISHED = {
    "rq-ffhq-256-355m": (355_393_536, "355M"),
    "rq-lsun-church-256-370m": (370_087_936, "370M"),
    "rq-lsun-cat-256-612m": (612_061_184, "612M"),
    "rq-lsun-bedroom-256-612m": (612_061_184, "612M"),
    "rq-imagenet-256-480m": (480_921_088, "480M"),
    "rq-imagenet-256-821m": (820_899_328, "821M"),
    "rq-imagenet-256-1.4b": (1_387_529_728, "1.4B"),
    "rq-imagenet-256-3.8b": (3_822_488_064, "3.8B"),
    "rq-cc3m-256-654m": (654_061_568, "654M"),
    "rq-text-to-image-256-3.9b": (3_903_996_928, "3.9B"),
}


def on_meta(cls, folder):
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder))


def count(model) -> int:
    """Without the codebook, a buffer that belongs to the RQ-VAE."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes(name):
    expected, published = PUBLISHED[name]
    transformer = on_meta(RQTransformerModel, PIPELINES / name / "transformer")
    assert count(transformer) == expected
    rounded = f"{expected / 1e6:.0f}M" if expected < 1e9 else f"{expected / 1e9:.1f}B"
    assert published == ("480M" if rounded == "481M" else rounded)

    vae = on_meta(RQVAEModel, PIPELINES / name / "vae")
    size = vae.config.sample_size // vae.spatial_scale_factor
    shape = (size, size, vae.config.code_depth)
    assert shape == tuple(transformer.config[key] for key in ("height", "width", "code_depth"))
    assert vae.quantizer.codebook.shape == transformer.codebook.shape

    index = json.loads((PIPELINES / name / "model_index.json").read_text())
    assert index["_class_name"] == "RQTransformerPipeline"
    assert index["transformer"] == ["rq_draft_revise.rq_transformer", "RQTransformerModel"]
    assert (index["tokenizer"] != [None, None]) == (transformer.config.text_vocab_size is not None)
    sampler = {key: index[key] for key in ("guidance_scale", "temperature", "top_k", "top_p")}
    RQTransformerPipeline(vae, transformer, **sampler)


def test_vq_gans_transformer():
    """taming-transformers' class-conditional 1.4B (K = 16384, 256 tokens, 48 blocks, d = 1536) has 1,410,640,896. This
    has beside those its own table of classes (there they share the codes'), the position of the last code, which is
    never read, and a bias in the head."""
    with torch.device("meta"):
        model = RQTransformerModel(
            height=16,
            width=16,
            code_depth=1,
            num_spatial_layers=48,
            num_depth_layers=0,
            num_attention_heads=24,
            num_classes=1000,
            learned_code_embedding=True,
        )
    assert count(model) == 1_410_640_896 + 1000 * 1536 + 1536 + 16384
    assert {name for name, _ in model.named_parameters() if "depth_transformer" in name} == {
        f"depth_transformer.{name}" for name in ("norm_out.weight", "norm_out.bias", "head.weight", "head.bias")
    }


def test_the_start_token_is_a_condition_of_one_row_and_a_null_condition_one_row_more():
    def rows(**config):
        model = tiny(None, **config)
        return model.condition_embedding.num_embeddings, model.prefix_length, model.null_condition_id

    assert rows() == (1, 1, None)
    assert rows(num_classes=5) == (5, 1, None)
    assert rows(num_classes=5, null_condition=True) == (6, 1, 5)
    assert rows(text_vocab_size=7) == (7, MAX_TEXT_LENGTH, None)
    assert rows(text_vocab_size=7, null_condition=True) == (8, MAX_TEXT_LENGTH, 7)


def test_names_of_the_weights_are_frozen():
    block = ["attn.to_k", "attn.to_out.#", "attn.to_q", "attn.to_v", "ff.net.#", "ff.net.#.proj", "norm1", "norm2"]
    always = [f"blocks.#.{name}" for name in block]
    always += [f"depth_transformer.{name}" for name in ("codebook.vectors", "head", "norm_out")]
    always += ["condition_embedding", "position_embedding", "prefix_position_embedding"]
    deep = [f"depth_transformer.blocks.#.{name}" for name in block]
    deep += ["depth_transformer.input_projection", "depth_transformer.position_embedding", "input_projection"]
    for model, expected in (
        (tiny("text"), always + deep + ["text_head", "text_norm_out"]),
        (tiny("class"), always + deep),
        (tiny(None), always + deep),
        (tiny(None, code_depth=1, num_depth_layers=0), [*always, "input_projection"]),
        (
            tiny("class", code_depth=1, num_depth_layers=0, learned_code_embedding=True),
            [*always, "code_embedding"],
        ),
    ):
        names = {re.sub(r"\.\d+(?=\.)", ".#", name) for name in model.state_dict()}
        assert sorted({re.sub(r"\.(weight|bias)$", "", name) for name in names}) == sorted(expected)


# ---- what a prediction depends on


@conditions
@pytest.mark.parametrize("code_depth, num_depth_layers, learned", SHAPES)
def test_every_parameter_gets_a_gradient(condition, code_depth, num_depth_layers, learned):
    config = dict(num_depth_layers=num_depth_layers, learned_code_embedding=learned)
    model = tiny(condition, code_depth, **config).train()
    model(labels=random_codes(model), **random_condition(model)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    unused = {name for name, p in model.named_parameters() if not p.grad.any()}
    if code_depth == 1:  # with one token the attention weight is 1 whatever the query
        unused = {name for name in unused if not re.search(r"depth_transformer.*to_[qk]", name)}
    assert all(name.endswith("to_k.bias") for name in unused)  # a softmax does not see a common shift
    assert model.position_embedding.grad.any(dim=1).tolist() == [True] * 5 + [False]  # the last stack is never read


@conditions
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_a_code_is_seen_by_the_deeper_codes_of_its_stack_and_by_all_later_stacks(condition, shared_codebook):
    model = tiny(condition, shared_codebook=shared_codebook)
    labels, arguments = random_codes(model), random_condition(model)
    with torch.no_grad():
        before = model(labels=labels, **arguments).logits  # (B, N, D, K)
        for n, d in itertools.product(range(6), range(3)):
            changed = labels.clone()
            changed.flatten(1, 2)[0, n, d] = (labels.flatten(1, 2)[0, n, d] + 1) % 50
            moved = (model(labels=changed, **arguments).logits - before).abs().amax(dim=-1) > 1e-6  # (B, N, D)
            expected = torch.zeros_like(moved)
            expected[0, n, d + 1 :] = expected[0, n + 1 :] = True
            assert torch.equal(moved, expected)


def test_the_sequence_is_the_condition_and_then_the_stacks_but_the_last():
    model = tiny("text")
    labels, condition = random_codes(model), random_condition(model)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    with torch.no_grad():
        model(labels=labels, **condition)
        vectors = model.codebook[0, labels.flatten(1, 2)]  # (B, N, D, C)
        image = sum(model.input_projection(vectors[:, :, d]) for d in range(3)) + model.position_embedding
        text = model.condition_embedding.weight[condition["input_ids"]] + model.prefix_position_embedding
    torch.testing.assert_close(seen[0], torch.cat([text, image[:, :-1]], dim=1), rtol=0, atol=1e-5)


def test_a_token_sees_only_the_tokens_before_it_and_every_stack_sees_the_text():
    model = tiny("text")
    tokens, labels = random_condition(model)["input_ids"], random_codes(model)
    with torch.no_grad():
        before = model(labels=labels, input_ids=tokens)
        other_image = model(labels=random_codes(model, seed=1), input_ids=tokens)
        torch.testing.assert_close(other_image.text_logits, before.text_logits, rtol=0, atol=1e-6)
        for j in range(MAX_TEXT_LENGTH):
            changed = tokens.clone()
            changed[0, j] = (tokens[0, j] + 1) % model.config.text_vocab_size
            after = model(labels=labels, input_ids=changed)
            moved = (after.text_logits - before.text_logits).abs().amax(dim=-1) > 1e-6  # (B, P-1)
            assert moved[0].tolist() == [i >= j for i in range(MAX_TEXT_LENGTH - 1)] and not moved[1].any()
            moved = (after.logits - before.logits).abs().amax(dim=(2, 3)) > 1e-6
            assert moved[0].all() and not moved[1].any()


# ---- the loss


@conditions
@pytest.mark.parametrize("code_depth", [1, 3])
def test_the_loss_is_the_negative_log_likelihood(condition, code_depth):
    model = tiny(condition, code_depth)
    labels, arguments = random_codes(model), random_condition(model)
    with torch.no_grad():
        output = model(labels=labels, **arguments)
    assert output.logits.shape == (2, 6, code_depth, 50)
    log_probs = output.logits.double().log_softmax(dim=-1)
    by_hand = -log_probs.gather(-1, labels.flatten(1, 2).unsqueeze(-1)).mean()
    torch.testing.assert_close(output.image_loss.double(), by_hand, rtol=1e-5, atol=0)
    if condition != "text":
        assert torch.equal(output.loss, output.image_loss) and output.text_loss is None and output.text_logits is None
        return
    log_probs = output.text_logits.double().log_softmax(dim=-1)  # (B, P-1, V)
    text_loss = -log_probs.gather(-1, arguments["input_ids"][:, 1:].unsqueeze(-1)).mean()
    torch.testing.assert_close(output.text_loss.double(), text_loss, rtol=1e-5, atol=0)
    for weight in (0.0, 0.3, 1.0):
        loss = tiny(condition, code_depth, text_loss_weight=weight)(labels=labels, **arguments).loss.detach().double()
        torch.testing.assert_close(loss, (1 - weight) * by_hand + weight * text_loss, rtol=1e-5, atol=0)


def test_null_texts_teach_no_text():
    model = tiny("text").train()
    tokens, labels = random_condition(model, 4)["input_ids"], random_codes(model, 4)
    dropped = tokens.clone()
    dropped[[1, 3]] = model.null_condition_id
    mixed = model(labels=labels, input_ids=dropped).text_loss
    torch.testing.assert_close(mixed, model(labels=labels[[0, 2]], input_ids=tokens[[0, 2]]).text_loss)
    nothing = model(labels=labels, input_ids=torch.full_like(tokens, model.null_condition_id))
    nothing.loss.backward()
    assert float(nothing.text_loss.detach()) == 0 and nothing.loss.isfinite()
    assert not model.text_head.weight.grad.any() and model.depth_transformer.head.weight.grad.any()


@conditions
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(condition):
    model = tiny(condition).train()
    runs, results = [], []
    for block in (model.blocks[0], model.depth_transformer.blocks[0]):
        block.register_forward_pre_hook(lambda block, args: runs.append(type(block).__name__))
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        runs.clear()
        loss = model(labels=random_codes(model), **random_condition(model)).loss
        loss.backward()
        results.append([loss.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
        assert sorted(runs) == sorted(["SpatialTransformerBlock", "DepthTransformerBlock"] * (1 + checkpointing))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ---- sampling

SAMPLING = [
    dict(),
    dict(temperature=0.7, top_k=7, top_p=0.8),
    dict(temperature=1.3, top_k=[20, 5, None], top_p=[None, 0.9, 0.3]),
]


@pytest.mark.parametrize("condition, guidance_scale", [("class", None), ("text", None), (None, None), ("text", 2.5)])
@pytest.mark.parametrize("sampling", SAMPLING, ids=["plain", "limited", "per depth"])
def test_cached_sampling_equals_the_naive_sampler(condition, guidance_scale, sampling):
    model = tiny(condition)
    uniforms, arguments = random_uniforms(model), random_condition(model)
    codes, log_probs = sample(model, uniforms, arguments, guidance_scale=guidance_scale, **sampling)
    expected, expected_log_probs = naive_sample(model, uniforms, arguments, guidance_scale, **sampling)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=0, atol=1e-3)
    assert len(codes.unique()) > 5


@pytest.mark.parametrize("code_depth, num_depth_layers, learned", SHAPES[1:])
def test_cached_sampling_of_one_code_a_position_equals_the_naive_sampler(code_depth, num_depth_layers, learned):
    config = dict(num_depth_layers=num_depth_layers, learned_code_embedding=learned)
    model = tiny("class", code_depth, **config)
    uniforms, arguments = random_uniforms(model, 3), random_condition(model, 3)
    for scale in (None, 3.0):
        codes, _ = sample(model, uniforms, arguments, guidance_scale=scale, top_k=[9])
        assert torch.equal(codes, naive_sample(model, uniforms, arguments, scale, top_k=9)[0])


def test_separate_codebooks_sample_as_the_naive_sampler():
    model = tiny("class", shared_codebook=False)
    uniforms, arguments = random_uniforms(model), random_condition(model)
    assert torch.equal(sample(model, uniforms, arguments)[0], naive_sample(model, uniforms, arguments)[0])


@conditions
def test_a_row_does_not_depend_on_its_batch(condition):
    model = tiny(condition)
    uniforms, arguments = random_uniforms(model, 3), random_condition(model, 3)
    codes, log_probs = sample(model, uniforms, arguments)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in arguments.items()}
        ours, ours_log_probs = sample(model, uniforms[row : row + 1], alone)
        assert torch.equal(ours[0], codes[row])
        torch.testing.assert_close(ours_log_probs[0], log_probs[row], rtol=0, atol=1e-5)


@conditions
def test_a_step_fills_one_slot_of_the_cache_in_place(condition):
    model = tiny(condition)
    codes, uniforms, arguments = random_codes(model), random_uniforms(model), random_condition(model)
    known = model.prefix_length - 1
    with torch.no_grad():
        cache = model(**(arguments or {"codes": codes})).past_key_values
        assert cache.shape == (2, 2, 2, known + 6, 4, 8)
        for n in range(6):
            filled = cache.flatten(4).any(dim=-1)  # (layers, 2, B, slots)
            assert filled[..., : known + n].all() and not filled[..., known + n :].any()
            before = cache.clone()
            output = model(codes, torch.tensor([n]), uniforms[:, n], past_key_values=cache, **arguments)
            assert output.past_key_values is cache
            assert torch.equal(cache[:, :, :, : known + n], before[:, :, :, : known + n])
        # all that was read is what teacher forcing reads
        keys = []
        for block in model.blocks:
            block.register_forward_hook(lambda block, args, output: keys.append(torch.stack(output[1:])))
        model(labels=codes, **arguments)
    torch.testing.assert_close(cache, torch.stack(keys), rtol=0, atol=1e-5)


def test_tuples_are_the_outputs_in_order_with_a_differentiable_tensor_first():
    model = tiny("text")
    condition, codes = random_condition(model), random_codes(model)
    with torch.no_grad():
        cache = model(**condition).past_key_values
    step = dict(codes=codes, position=torch.tensor([1]), uniforms=random_uniforms(model)[:, 1], past_key_values=cache)
    for inputs in (dict(labels=codes), {}, step):
        as_tuple, as_dict = model(**inputs, **condition, return_dict=False), model(**inputs, **condition)
        assert isinstance(as_tuple, tuple) and as_tuple[0].requires_grad
        assert all(torch.equal(a, b) for a, b in zip(as_tuple, as_dict.to_tuple(), strict=True))


def test_forward_draws_nothing_and_neither_training_mode_nor_fused_projections_change_it():
    model = tiny("class")
    uniforms, arguments = random_uniforms(model), random_condition(model)
    state = torch.get_rng_state()
    codes, _ = sample(model, uniforms, arguments)
    assert torch.equal(sample(model.train(), uniforms, arguments)[0], codes)
    assert torch.equal(torch.get_rng_state(), state)
    model.fuse_qkv_projections()
    assert torch.equal(sample(model, uniforms, arguments)[0], codes)


# ---- compilation


@pytest.mark.parametrize("condition, guided", [("text", True), ("class", False), (None, False)])
def test_one_graph_samples_all_positions(fresh_compiler, condition, guided):
    model = tiny(condition)
    uniforms, arguments = random_uniforms(model), random_condition(model)
    sampling = dict(top_k=[20, 10, 5], top_p=0.9, temperature=torch.tensor(0.8))
    sampling["guidance_scale"] = torch.tensor(2.0) if guided else None
    expected, expected_log_probs = sample(model, uniforms, arguments, **sampling)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    class Compiled:
        """The new cache by the model itself, which is another graph; the steps compiled."""

        def __call__(self, *args, **kwargs):
            return (compiled if args else model)(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(model, name)

    with torch._dynamo.config.patch(error_on_recompile=True):
        codes, log_probs = sample(Compiled(), uniforms, arguments, **sampling)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(codes, expected)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=1e-4)


def test_repeated_blocks_compile_once_a_use(fresh_compiler):
    reference, model = tiny("text"), tiny("text")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    uniforms, arguments = random_uniforms(model), random_condition(model)
    with (
        torch._dynamo.config.patch(recompile_limit=3),
        torch.fx.experimental._config.patch(use_duck_shape=False),  # equal sizes are chance
    ):
        codes, _ = sample(model, uniforms, arguments)
    assert torch.equal(codes, sample(reference, uniforms, arguments)[0])


def test_a_step_is_exportable(fresh_compiler):
    model = tiny("class")
    codes, arguments, uniforms = random_codes(model), random_condition(model), random_uniforms(model)

    def inputs(n):
        with torch.no_grad():
            cache = model(**arguments).past_key_values
            for before in range(n):
                model(codes, torch.tensor([before]), uniforms[:, before], past_key_values=cache, **arguments)
        return dict(
            codes=codes, position=torch.tensor([n]), uniforms=uniforms[:, n], past_key_values=cache, **arguments
        )

    exported = torch.export.export(model, (), inputs(0)).module()
    with torch.no_grad():
        assert torch.equal(exported(**inputs(3)).stacks, model(**inputs(3)).stacks)


# ---- saving, dtypes, bad input


@pytest.mark.parametrize("condition, code_depth, config", [("text", 3, {}), ("class", 1, dict(num_depth_layers=0))])
def test_a_saved_model_loads_as_it_was(tmp_path, condition, code_depth, config):
    model = tiny(condition, code_depth, **config)
    model.save_pretrained(tmp_path)
    loaded, info = RQTransformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not loaded.training
    assert all(loaded.config[name] == value for name, value in model.config.items() if name[0] != "_")
    inputs = dict(labels=random_codes(model), **random_condition(model))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert set(inspect.signature(RQTransformerModel.__init__).parameters) - {"self"} <= set(model.config)


@pytest.mark.parametrize("function", [RQTransformerModel, RQTransformerModel.forward, RQTransformerPipeline])
def test_documented_defaults_are_those_of_the_signature(function):
    parameters = inspect.signature(function).parameters
    documented = re.findall(r"(\w+) \(`[^`]+`(?: of [^)]*)?, defaults to `?([^`)]+?)`?\)", function.__doc__)
    assert documented
    for name, default in documented:
        assert parameters[name].default == eval(default), name
    for name in re.findall(r"(\w+) \(`[^`]+`[^)]*, \*optional\*\)", function.__doc__):
        assert parameters[name].default is None, name


@pytest.mark.parametrize(
    "config, message",
    [
        *(({name: 0}, f"`{name}` must be at least 1, got 0") for name in SIZES),
        ({"num_depth_layers": 0}, "`num_depth_layers` must be at least 1 with `code_depth` 4, got 0"),
        ({"num_classes": 5, "text_vocab_size": 7}, "`num_classes` or `text_vocab_size`, not both: got 5 and 7"),
        ({"text_loss_weight": 1.5}, r"`text_loss_weight` must lie in \[0, 1\], got 1.5"),
        ({"null_condition": True}, "`null_condition` must be False for an unconditional model"),
        ({"learned_code_embedding": True}, "`learned_code_embedding` must be False with `code_depth` 4"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        RQTransformerModel(**config)


def bad_calls():
    ids, tokens = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    codes = torch.zeros(2, 2, 3, 3, dtype=torch.int64)
    first, uniforms, cache = torch.tensor([0]), torch.zeros(2, 3), torch.zeros(2, 2, 2, 6, 4, 8)
    teach = dict(labels=codes, class_labels=ids)
    step = dict(codes=codes, position=first, uniforms=uniforms, past_key_values=cache, class_labels=ids)
    return [
        ("class", dict(labels=codes), "`class_labels` as its condition, got none"),
        ("class", dict(labels=codes, input_ids=tokens), r"`class_labels` as its condition, got \['input_ids'\]"),
        ("text", dict(labels=codes, class_labels=ids), "`input_ids` as its condition"),
        (None, dict(labels=codes, class_labels=ids), "takes no condition, got"),
        (None, dict(), r"\['codes'\] \(a new cache\), got nothing"),
        ("class", teach | dict(codes=codes), "`labels` .teacher forcing.*got"),
        ("class", step | dict(position=None), r"'position', 'uniforms'.*got \['codes', 'uniforms'"),
        ("class", step | dict(past_key_values=None), "'past_key_values'"),
        ("class", teach | dict(guidance_scale=2.0), "`guidance_scale` must be None except in the sampling"),
        ("class", dict(class_labels=ids, guidance_scale=2.0), "`guidance_scale` must be None except"),
        ("class", teach | dict(labels=codes[..., :2]), r"`labels` must be int64 of shape \(batch_size, 2, 3, 3\)"),
        ("class", teach | dict(labels=codes.float()), "`labels` must be int64 .* got torch.float32"),
        ("class", teach | dict(labels=codes[:0], class_labels=ids[:0]), "`labels` must be int64"),
        ("class", teach | dict(labels=codes + 50), r"`labels` must lie in \[0, 49\], got values in \[50, 50\]"),
        ("class", teach | dict(labels=[1]), "`labels` must be a torch.Tensor or None, got list"),
        ("class", teach | dict(class_labels=ids + 6), r"`class_labels` must lie in \[0, 5\]"),
        ("class", teach | dict(class_labels=ids[:1]), r"`class_labels` must be int64 of shape \(2\), got .*\(1,\)"),
        ("text", dict(labels=codes, input_ids=tokens[:, :4]), r"`input_ids` must be int64 of shape \(2, 6\)"),
        ("text", dict(labels=codes, input_ids=tokens - 1), r"`input_ids` must lie in \[0, 14\]"),
        ("class", step | dict(codes=codes + 51), r"`codes` must lie in \[0, 50\]"),
        ("class", step | dict(position=torch.tensor(0)), r"`position` must be int64 of shape \(1\)"),
        ("class", step | dict(position=first + 6), r"`position` must lie in \[0, 5\]"),
        ("class", step | dict(uniforms=uniforms[:, :2]), r"`uniforms` must be floating-point of shape \(2, 3\)"),
        ("class", step | dict(past_key_values=cache[:, :, :, :5]), r"`past_key_values` .* \(2, 2, 2, 6, 4, 8\)"),
        ("class", step | dict(guidance_scale=2.0), r"`class_labels` must be int64 of shape \(4\)"),
        ("class", step | dict(temperature=0.0), "`temperature` must be a positive finite number"),
        ("class", step | dict(top_k=0), "`top_k` must be an integer of at least 1, got 0"),
        ("class", step | dict(top_k=[1, 2]), r"`top_k` must be a number or a list of 3, one a depth, got \[1, 2\]"),
        ("class", step | dict(top_p=[0.5, 0.5, 1.5]), r"`top_p` must lie in \(0, 1\], got 1.5"),
    ]


@pytest.mark.parametrize("condition, arguments, message", bad_calls())
def test_a_call_that_makes_no_sense_is_refused(condition, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(condition)(**arguments)


def test_a_codebook_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`codebook` must have shape \(1, 51, 16\), got \(3, 51, 16\)"):
        tiny(None).set_codebook(torch.zeros(3, 51, 16))


# ---- the pipeline

CALLS = {
    "text": dict(prompt=["a cat", "the owl at night"]),
    "class": dict(class_labels=["class 1", 4]),
    None: dict(num_images_per_prompt=2),
}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds or (1, 2)]


def call(pipe, condition="text", **kwargs):
    guidance = {} if condition is None else dict(guidance_scale=2.0)
    return pipe(**{**CALLS[condition], **guidance, "generator": generators(), "output_type": "pt", **kwargs}).images


@conditions
def test_the_pipeline_samples_what_the_naive_sampler_samples(condition):
    pipe = tiny_pipeline(condition, defaults=dict(top_k=[20, None, 10], temperature=0.9))
    model = pipe.transformer
    scale = None if condition is None else 2.0
    codes = call(pipe, condition, output_type="latent")
    arguments = {}
    if condition == "class":
        arguments = dict(class_labels=torch.tensor([1, 4]))
    elif condition == "text":
        arguments = condition_ids(model, pipe.tokenizer, prompt=CALLS["text"]["prompt"])
    uniforms = torch.stack([torch.rand(16, 3, generator=generator) for generator in generators()])
    expected, _ = naive_sample(model, uniforms, arguments, scale, 0.9, [20, None, 10])
    assert torch.equal(codes, expected)


@conditions
def test_a_list_of_generators_gives_single_images_in_any_batch(condition):
    pipe = tiny_pipeline(condition)
    batch = call(pipe, condition, output_type="latent")
    for row, seed in enumerate((1, 2)):
        single = {name: value[row] for name, value in CALLS[condition].items() if isinstance(value, list)}
        single = single or dict(num_images_per_prompt=1)
        alone = call(pipe, condition, output_type="latent", **single, generator=generators(seed))
        assert torch.equal(alone[0], batch[row])
    one = torch.Generator().manual_seed(5)
    first = call(pipe, condition, output_type="latent", generator=one)
    assert torch.equal(first, call(pipe, condition, output_type="latent", generator=one.manual_seed(5)))
    assert not torch.equal(first, batch)


def test_several_images_of_a_prompt_are_its_rows_and_read_it_once():
    pipe = tiny_pipeline("text")
    rows = []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda block, args: rows.append(tuple(args[0].shape[:2])))
    several = call(pipe, num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="latent")
    assert rows == [(4, 5)] + [(8, 1)] * 16  # two prompts and two null texts; four images, guided
    rows.clear()
    prompts = [prompt for prompt in CALLS["text"]["prompt"] for _ in range(2)]
    expected = call(pipe, prompt=prompts, generator=generators(1, 2, 3, 4), output_type="latent")
    assert torch.equal(several, expected)
    rows.clear()
    call(pipe, guidance_scale=1.0)
    assert rows == [(2, 5)] + [(2, 1)] * 16  # guidance 1 costs no second row


def test_a_negative_prompt_guides_also_a_model_without_a_null_text():
    with_null, without = tiny_pipeline("text"), tiny_pipeline("text", null_condition=False)
    assert without.transformer.null_condition_id is None
    for pipe in (with_null, without):
        codes = call(pipe, negative_prompt="a volcano", output_type="latent")
        assert not torch.equal(codes, call(pipe, negative_prompt="snow", output_type="latent"))
        if pipe is with_null:
            assert not torch.equal(codes, call(pipe, output_type="latent"))
    with pytest.raises(ValueError, match="`guidance_scale` must be 1: .* no null condition and no `negative_prompt`"):
        call(without)
    with pytest.raises(ValueError, match="`guidance_scale` must be 1: this model has no null condition to guide away"):
        call(tiny_pipeline("class", null_condition=False), "class")
    with pytest.raises(ValueError, match="`guidance_scale` must be 1"):
        call(tiny_pipeline(None), None, guidance_scale=0)


def test_an_empty_negative_prompt_is_the_null_text_and_refused_without_one():
    pipe = tiny_pipeline("text")
    none, snow = call(pipe, output_type="latent"), call(pipe, negative_prompt="snow", output_type="latent")
    assert torch.equal(call(pipe, negative_prompt="", output_type="latent"), none)
    mixed = call(pipe, negative_prompt=["snow", " \t"], output_type="latent")
    assert torch.equal(mixed[0], snow[0]) and torch.equal(mixed[1], none[1])
    for blank in ("", ["snow", " "]):
        with pytest.raises(ValueError, match="`negative_prompt` must not be empty: .* this model has none, got"):
            call(tiny_pipeline("text", null_condition=False), negative_prompt=blank)


@conditions
def test_given_stacks_are_kept_and_seen(condition):
    pipe = tiny_pipeline(condition)
    free = call(pipe, condition, output_type="latent")
    latents = torch.full_like(free, pipe.transformer.mask_token_id)
    latents[0, 1, 2] = (free[0, 1, 2] + 1) % 50
    codes = call(pipe, condition, output_type="latent", latents=latents)
    assert torch.equal(codes[0, 1, 2], latents[0, 1, 2]) and torch.equal(codes[1], free[1])
    same = (codes[0] == free[0]).flatten(0, 1).all(dim=1)
    assert same[:6].all() and not same[6] and not same[7:].all()
    assert latents[0, 0, 0, 0] == 50  # the caller's own tensor
    everything = call(pipe, condition, output_type="latent", latents=free)
    assert torch.equal(everything, free)


def test_callbacks_see_each_position_and_may_change_what_follows():
    pipe = tiny_pipeline("class")
    seen = []

    def look(pipe, step, timestep, kwargs):
        seen.append((step, timestep, kwargs["latents"]))

    free = call(pipe, "class", callback_on_step_end=look, output_type="latent")
    assert [(step, timestep) for step, timestep, _ in seen] == [(n, n) for n in range(16)] and pipe.num_timesteps == 16
    for n, (_, _, latents) in enumerate(seen):
        done = (latents != 50).all(dim=-1).flatten(1)
        assert done[:, : n + 1].all() and not done[:, n + 1 :].any()
        assert torch.equal(latents.flatten(1, 2)[:, : n + 1], free.flatten(1, 2)[:, : n + 1])

    def change(pipe, step, timestep, kwargs):
        if step == 3:
            latents = kwargs["latents"].clone()
            latents[:, 0, 3] = 7
            return {"latents": latents}

    changed = call(pipe, "class", callback_on_step_end=change, output_type="latent")
    assert (changed[:, 0, 3] == 7).all() and not torch.equal(changed[:, 1:], free[:, 1:])

    def mask_again(pipe, step, timestep, kwargs):
        latents = kwargs["latents"].clone()
        latents[1, 0, 0] = 50  # nothing would fill it
        return {"latents": latents}

    message = r"`callback_on_step_end` must return `latents` that are masked where .* got 1 position\(s\) masked"
    with pytest.raises(ValueError, match=message):
        call(pipe, "class", callback_on_step_end=mask_again)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 4

    stopped = call(pipe, "class", callback_on_step_end=stop, output_type="latent")
    assert ((stopped != 50).all(dim=-1).flatten(1).sum(dim=1) == 5).all()

    def guide(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 5.0

    assert not torch.equal(call(pipe, "class", callback_on_step_end=guide, output_type="latent"), free)
    with pytest.raises(ValueError, match="`guidance_scale` may change only in a run that is guided"):
        call(pipe, "class", callback_on_step_end=guide, guidance_scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@conditions
def test_half_precision_draws_finite_images(condition, dtype):
    images = call(tiny_pipeline(condition).to(dtype), condition)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all() and images.std() > 0.01


def test_output_types_agree():
    pipe = tiny_pipeline("class")
    pt, np_, pil = (call(pipe, "class", output_type=kind) for kind in ("pt", "np", "pil"))
    assert np.array_equal(np_, pt.permute(0, 2, 3, 1).numpy()) and pil[0].size == (8, 8)
    codes = call(pipe, "class", output_type="latent")
    assert torch.equal(pipe.decode_latents(codes, output_type="pt"), pt)
    assert pipe.get_label_ids(["alias 2", "class 3"]) == [2, 3]


def test_offloading_sees_every_access_to_a_weight():
    pipe = tiny_pipeline("text")
    expected = call(pipe)
    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert pipe.transformer.position_embedding.is_meta
    torch.testing.assert_close(call(pipe), expected, atol=1e-6, rtol=0)
    pipe = tiny_pipeline("text")
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(call(pipe), expected, atol=1e-6, rtol=0)


@conditions
def test_saving_and_loading_keeps_everything(condition, tmp_path):
    defaults = dict(guidance_scale=1.5 if condition else 1.0, temperature=0.8, top_k=[20, None, 10], top_p=0.9)
    pipe = tiny_pipeline(condition, defaults=defaults)
    expected = call(pipe, condition)
    pipe.save_pretrained(tmp_path)
    loaded = RQTransformerPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded, condition), expected)
    assert {name: loaded.config[name] for name in defaults} == defaults
    assert (loaded.tokenizer is None) == (condition != "text") and loaded.config.id2label == pipe.config.id2label
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["_class_name"] == "RQTransformerPipeline"
    assert saved["transformer"] == ["rq_draft_revise.rq_transformer", "RQTransformerModel"]
    assert saved["vae"] == ["rq_draft_revise.rqvae", "RQVAEModel"]
    assert set(loaded.components) == {"vae", "transformer", "tokenizer"}
    assert RQTransformerPipeline.from_pretrained(tmp_path, top_p=0.5).config.top_p == 0.5


FRESH = """
import sys, torch
from rq_draft_revise import RQTransformerPipeline

torch.set_num_threads(1)
pipe = RQTransformerPipeline.from_pretrained(sys.argv[1])
generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
prompt = ["a cat", "the owl at night"]
torch.save(pipe(prompt, guidance_scale=2.0, generator=generator, output_type="pt").images, sys.argv[2])
"""


@pytest.mark.slow
def test_a_fresh_process_in_another_folder_draws_the_same_image(tmp_path):
    pipe = tiny_pipeline("text")
    expected = call(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    source = str(Path(rq_draft_revise.__file__).parents[1])
    arguments = [str(tmp_path / "pipeline"), str(tmp_path / "images.pt")]
    subprocess.run(
        [sys.executable, "-c", FRESH, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": source, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "condition, arguments, message",
    [
        ("text", dict(prompt=None), "`prompt` must be given: this model is text-conditional"),
        ("class", dict(prompt="a cat"), "`prompt` must be None: this model is not text-conditional"),
        ("class", dict(class_labels=None), "`class_labels` must be given: this model is class-conditional"),
        (None, dict(class_labels=1), "`class_labels` must be None: this model is not class-conditional"),
        ("class", dict(class_labels=[1, 5]), r"`class_labels` must lie in \[0, 4\], got 5"),
        ("class", dict(class_labels="volcano"), "`class_labels` must be names in"),
        ("text", dict(prompt=["a cat", " "]), "`prompt` must not be empty"),
        ("text", dict(prompt=3), "`prompt` must be a string or a non-empty list of strings, got 3"),
        ("text", dict(negative_prompt=["a"] * 3), "`negative_prompt` must be one string or 2"),
        ("class", dict(negative_prompt="a"), "`negative_prompt` needs a `prompt`"),
        ("class", dict(num_images_per_prompt=0), "`num_images_per_prompt` must be a positive integer, got 0"),
        ("class", dict(guidance_scale=-1), "`guidance_scale` must be a finite number of at least 0"),
        ("class", dict(temperature=0), "`temperature` must be a positive finite number"),
        ("class", dict(top_k=[5, 5]), "`top_k` must be a number or a list of 3"),
        ("class", dict(top_p=[0.5, 0, 0.5]), r"`top_p` must lie in \(0, 1\], got 0"),
        ("class", dict(generator=[torch.Generator()]), "`generator` must be one or a list of 2"),
        ("class", dict(latents=torch.zeros(1, 4, 4, 3, dtype=torch.int64)), r"`latents` must have shape \(2, 4, 4, 3"),
        ("class", dict(latents=torch.zeros(2, 4, 4, 3)), "`latents` must have dtype torch.int64"),
        ("class", dict(output_type="jpg"), "`output_type` must be"),
        ("class", dict(callback_on_step_end=3), "`callback_on_step_end` must be callable"),
        ("class", dict(callback_on_step_end_tensor_inputs=["x"]), "`callback_on_step_end_tensor_inputs` must be"),
    ],
)
def test_a_pipeline_call_that_makes_no_sense_is_refused(condition, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_pipeline(condition), condition, **arguments)


def test_components_and_defaults_that_do_not_fit_are_refused():
    vae = tiny_vae()
    with pytest.raises(ValueError, match="`vae` and `transformer` must have the same codebook"):
        RQTransformerPipeline(vae, tiny_rq_transformer("class", vae=tiny_vae(seed=1)))
    transformer = tiny_rq_transformer("class", vae=vae)
    for defaults, message in (
        (dict(top_k=[1]), "`top_k` must be a number or a list of 3"),
        (dict(top_p=2), "`top_p` must lie in"),
        (dict(temperature=0), "`temperature` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            RQTransformerPipeline(vae, transformer, **defaults)
    pipe = RQTransformerPipeline(vae, tiny_rq_transformer("text", vae=vae))
    with pytest.raises(ValueError, match="`prompt` needs a pipeline with a `tokenizer`"):
        pipe("a cat")
