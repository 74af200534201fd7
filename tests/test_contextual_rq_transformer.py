"""The Contextual RQ-Transformer: what a prediction may depend on, and that sampling inverts teacher forcing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from components import CONDITIONS, SIZES, random_codes, random_condition, tiny_transformer

from rq_draft_revise import ContextualRQTransformerModel
from rq_draft_revise.depth_transformer import filter_logits, sample_codes


conditions = pytest.mark.parametrize("condition", CONDITIONS)
depths = pytest.mark.parametrize("code_depth", [1, 3])


def masked_codes(model, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """`labels` with the stacks of `masked` `(B, N)` replaced by the mask."""
    grid = masked.unflatten(1, (model.config.height, model.config.width)).unsqueeze(-1)
    return labels.masked_fill(grid, model.mask_token_id)


def some_mask(batch_size: int = 2, size: int = 5, seed: int = 0) -> torch.Tensor:
    """A mask `(B, 16)` with `size` positions in each row."""
    scores = torch.rand(batch_size, 16, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(dim=-1).argsort(dim=-1) < size


def uniforms_for(model, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, model.config.code_depth, generator=torch.Generator().manual_seed(seed))


def null_like(model, condition: dict) -> dict:
    return {name: torch.full_like(value, model.null_condition_id) for name, value in condition.items()}


def guided(model, condition: dict) -> dict:
    """The conditions, then as many null conditions."""
    null = null_like(model, condition)
    return {name: torch.cat([value, null[name]]) for name, value in condition.items()}


# ---- Table 1


@pytest.mark.parametrize(
    "num_spatial_layers, num_depth_layers, num_attention_heads, condition, expected",
    [
        (24, 4, 16, {"num_classes": 1000}, 371_111_168),
        (24, 4, 24, {"num_classes": 1000}, 820_899_584),
        (42, 6, 24, {"num_classes": 1000}, 1_387_529_984),
        (21, 4, 16, {"text_vocab_size": 16384, "max_text_length": 32}, 365_903_104),
        (26, 4, 20, {"text_vocab_size": 16384, "max_text_length": 32}, 654_061_824),
    ],
)
def test_table_1_counts_the_parameters_without_the_null_condition(
    num_spatial_layers, num_depth_layers, num_attention_heads, condition, expected
):
    """The codebook belongs to the RQ-VAE: here it is a buffer, and Table 1 does not count it."""
    with torch.device("meta"):
        model = ContextualRQTransformerModel(
            num_spatial_layers=num_spatial_layers,
            num_depth_layers=num_depth_layers,
            num_attention_heads=num_attention_heads,
            **condition,
        )
    null_condition = num_attention_heads * 64
    assert sum(parameter.numel() for parameter in model.parameters()) == expected + null_condition
    assert [name for name, _ in model.named_buffers()] == ["depth_transformer.codebook.vectors"]


# ---- every parameter is used


@conditions
@pytest.mark.parametrize("code_depth, num_depth_layers", [(1, 0), (1, 2), (3, 2)])
def test_every_parameter_gets_a_gradient(condition, code_depth, num_depth_layers):
    """DDP waits for the gradient of each parameter: so D = 1 has no projection into the depth transformer."""
    model = tiny_transformer(condition, code_depth=code_depth, num_depth_layers=num_depth_layers).train()
    assert (model.depth_transformer.input_projection is None) == (code_depth == 1)
    labels = random_codes(model)
    for masked in (some_mask(), some_mask(size=16)):  # also where nothing is known
        model.zero_grad()
        codes = masked_codes(model, labels, masked)
        model(codes, labels=labels, **random_condition(model)).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    # with one token the attention weight is 1 whatever the query
    idle = ("to_q", "to_k") if code_depth == 1 else ()
    unused = [name for name, p in model.named_parameters() if not p.grad.any() and not any(i in name for i in idle)]
    assert [name for name in unused if not name.endswith("to_k.bias")] == []  # a softmax does not see a common shift


# ---- what a prediction depends on


@conditions
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_a_prediction_sees_the_known_codes_and_the_shallower_codes_of_its_own_stack(condition, shared_codebook):
    """Change one true code at a masked position: no other position sees it, nor its own depth, nor any shallower one.
    Change one known code: everything sees it."""
    model = tiny_transformer(condition, shared_codebook=shared_codebook)
    labels, masked = random_codes(model), some_mask()
    codes, positions = masked_codes(model, labels, masked), masked.nonzero()[:, 1].view(2, -1)
    arguments = dict(positions=positions, **random_condition(model))
    with torch.no_grad():
        before = model(codes, labels=labels, **arguments).logits  # (B, n, D, K)
        for depth in range(model.config.code_depth):
            changed = labels.clone()
            row, column = divmod(int(positions[0, 2]), 4)
            changed[0, row, column, depth] = (labels[0, row, column, depth] + 1) % 50
            moved = (model(codes, labels=changed, **arguments).logits - before).abs().amax(dim=-1) > 1e-6  # (B, n, D)
            expected = torch.zeros_like(moved)
            expected[0, 2, depth + 1 :] = True
            assert torch.equal(moved, expected)

            known = codes.clone()
            row, column = divmod(int((~masked[0]).nonzero()[0]), 4)
            known[0, row, column, depth] = (codes[0, row, column, depth] + 1) % 50
            moved = (model(known, labels=labels, **arguments).logits - before).abs().amax(dim=(1, 2, 3)) > 1e-6
            assert moved.tolist() == [True, False]


def test_a_known_stack_enters_as_the_sum_of_its_projected_vectors_and_a_masked_one_as_the_mask():
    model = tiny_transformer(None)
    labels, masked = random_codes(model), some_mask()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    with torch.no_grad():
        model(masked_codes(model, labels, masked), labels=labels)
        vectors = model.codebook[0, labels.flatten(1, 2)]  # (B, N, D, C)
        known = sum(model.input_projection(vectors[:, :, depth]) for depth in range(3))
        mask = model.input_projection(model.mask_embedding)
        expected = torch.where(masked.unsqueeze(-1), mask, known) + model.position_embedding
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


# ---- the condition


@pytest.mark.parametrize("condition", ["class", "text"])
def test_the_prefix_never_sees_the_image_and_the_image_sees_the_prefix(condition):
    model = tiny_transformer(condition)
    arguments = random_condition(model)
    keys = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: keys.append(output[1:]))
    with torch.no_grad():
        prefix = model(**arguments).prefix_key_values
        alone = keys[:]
        outputs, of_image = [], []
        for seed in (0, 1):
            keys.clear()
            codes = masked_codes(model, random_codes(model, seed=seed), some_mask())
            outputs.append(model(codes, labels=random_codes(model), prefix_key_values=prefix).logits)
            of_image.append(keys[:])
        other = model(codes, labels=random_codes(model), **null_like(model, arguments)).logits
    length = model.prefix_length
    assert prefix.shape == (2, 2, 2, length, 4, 8)
    for layer in range(2):
        for kv in range(2):
            assert torch.equal(alone[layer][kv], prefix[layer, kv])
            for image in of_image:
                assert torch.equal(image[layer][kv][:, :length], prefix[layer, kv])
            assert not torch.equal(of_image[0][layer][kv][:, length:], of_image[1][layer][kv][:, length:])
    assert not torch.allclose(outputs[1], other, atol=1e-3), "the image must see its condition"


@pytest.mark.parametrize("condition", ["class", "text"])
def test_a_cached_prefix_equals_the_condition(condition):
    model = tiny_transformer(condition)
    arguments, labels = random_condition(model), random_codes(model)
    codes = masked_codes(model, labels, some_mask())
    uniforms = uniforms_for(model, 2, 5)
    with torch.no_grad():
        prefix = model(**arguments).prefix_key_values
        for use in ({"labels": labels}, {"uniforms": uniforms}):
            ours, reference = model(codes, **use, prefix_key_values=prefix), model(codes, **use, **arguments)
            assert torch.equal(ours[0], reference[0])
            assert "labels" in use or torch.equal(ours.stacks, reference.stacks)
        double = model(**guided(model, arguments)).prefix_key_values
        ours = model(codes, uniforms=uniforms, prefix_key_values=double, guidance_scale=2.0)
        reference = model(codes, uniforms=uniforms, guidance_scale=2.0, **guided(model, arguments))
    assert torch.equal(ours.stacks, reference.stacks) and torch.equal(ours.log_probs, reference.log_probs)


def test_a_token_sees_only_the_tokens_before_it():
    model = tiny_transformer("text")
    tokens = random_condition(model)["input_ids"]
    labels = random_codes(model)
    codes = masked_codes(model, labels, some_mask())
    with torch.no_grad():
        before = model(input_ids=tokens).prefix_key_values
        text_logits = model(codes, labels=labels, input_ids=tokens).text_logits
        for j in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, j] = (tokens[:, j] + 1) % model.config.text_vocab_size
            moved = (model(input_ids=changed).prefix_key_values - before).abs().amax(dim=(1, 4, 5)) > 1e-6
            expected = torch.zeros_like(moved)  # (layers, B, P)
            expected[0, :, j] = expected[1, :, j:] = True
            assert torch.equal(moved, expected)
            logits = model(codes, labels=labels, input_ids=changed).text_logits
            assert torch.equal(logits[:, :j], text_logits[:, :j])


# ---- the loss


@conditions
@depths
def test_the_loss_is_the_negative_log_likelihood_of_the_masked_stacks(condition, code_depth):
    model = tiny_transformer(condition, code_depth=code_depth)
    labels, masked, arguments = random_codes(model), some_mask(), random_condition(model)
    with torch.no_grad():
        output = model(masked_codes(model, labels, masked), labels=labels, **arguments)
    stacks = labels.flatten(1, 2)[masked].view(2, 5, code_depth)
    by_hand = -output.logits.double().log_softmax(dim=-1).gather(-1, stacks.unsqueeze(-1)).mean()
    torch.testing.assert_close(output.image_loss.double(), by_hand, rtol=1e-5, atol=0)
    if condition != "text":
        assert torch.equal(output.loss, output.image_loss) and output.text_loss is None and output.text_logits is None
        return
    log_probs = output.text_logits.double().log_softmax(dim=-1)  # (B, P-1, V)
    text_loss = -log_probs.gather(-1, arguments["input_ids"][:, 1:].unsqueeze(-1)).mean()
    torch.testing.assert_close(output.text_loss.double(), text_loss, rtol=1e-5, atol=0)
    for weight in (0.0, 0.3, 1.0):
        model = tiny_transformer(condition, code_depth=code_depth, text_loss_weight=weight)
        loss = model(masked_codes(model, labels, masked), labels=labels, **arguments).loss.detach().double()
        torch.testing.assert_close(loss, (1 - weight) * by_hand + weight * text_loss, rtol=1e-5, atol=0)


def test_null_texts_teach_no_text():
    """Rows whose text was dropped for guidance count for the image and not for the text, and may be all there is."""
    model = tiny_transformer("text").train()
    tokens, labels = random_condition(model, 4)["input_ids"], random_codes(model, 4)
    codes = masked_codes(model, labels, some_mask(4))
    dropped = tokens.clone()
    dropped[[1, 3]] = model.null_condition_id
    mixed = model(codes, labels=labels, input_ids=dropped)
    kept = model(codes[[0, 2]], labels=labels[[0, 2]], input_ids=tokens[[0, 2]])
    torch.testing.assert_close(mixed.text_loss, kept.text_loss)

    nothing = model(codes, labels=labels, input_ids=torch.full_like(tokens, model.null_condition_id))
    assert float(nothing.text_loss.detach()) == 0 and nothing.text_logits.isfinite().all()
    nothing.loss.backward()
    assert nothing.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert not model.text_head.weight.grad.any() and model.depth_transformer.head.weight.grad.any()


@conditions
def test_images_with_equally_many_masked_positions_keep_their_shape_and_others_are_flat(condition):
    model = tiny_transformer(condition)
    labels, arguments = random_codes(model), random_condition(model)
    rectangular, ragged = some_mask(), some_mask()
    ragged[1] = False
    ragged[1, [3, 7, 8]] = True
    with torch.no_grad():
        a = model(masked_codes(model, labels, rectangular), labels=labels, **arguments)
        b = model(masked_codes(model, labels, ragged), labels=labels, **arguments)
        alone = {name: value[1:] for name, value in arguments.items()}
        c = model(masked_codes(model, labels[1:], ragged[1:]), labels=labels[1:], **alone)
    assert a.logits.shape == (2, 5, 3, 50) and b.logits.shape == (8, 3, 50) and c.logits.shape == (1, 3, 3, 50)
    torch.testing.assert_close(b.logits[:5], a.logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(b.logits[5:], c.logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        8 * b.image_loss,
        5 * F.cross_entropy(a.logits[0].flatten(0, 1), labels[0].flatten(0, 1)[rectangular[0]].flatten())
        + 3 * c.image_loss,
    )


@conditions
def test_positions_pick_among_the_same_predictions(condition):
    model = tiny_transformer(condition)
    labels, masked, arguments = random_codes(model), some_mask(), random_condition(model)
    codes = masked_codes(model, labels, masked)
    order = torch.tensor([[4, 0, 2], [1, 1, 3]])
    positions = masked.nonzero()[:, 1].view(2, 5).gather(1, order)
    with torch.no_grad():
        all_of_them = model(codes, labels=labels, **arguments).logits
        some = model(codes, positions, labels=labels, **arguments).logits
        torch.testing.assert_close(some, torch.stack([all_of_them[i, order[i]] for i in range(2)]), rtol=0, atol=1e-5)

        uniforms = uniforms_for(model, 2, 5)
        all_of_them = model(codes, uniforms=uniforms, **arguments).stacks
        picked = torch.stack([uniforms[i, order[i]] for i in range(2)])
        some = model(codes, positions, picked, **arguments).stacks
        assert torch.equal(some, torch.stack([all_of_them[i, order[i]] for i in range(2)]))


@pytest.mark.parametrize("condition", ["class", "text"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(condition):
    model = tiny_transformer(condition).train()
    labels = random_codes(model)
    codes = masked_codes(model, labels, some_mask())
    results, recomputed = [], []
    for block in (model.blocks[0], model.depth_transformer.blocks[0]):
        block.register_forward_pre_hook(lambda block, args: recomputed.append(type(block).__name__))
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        recomputed.clear()
        loss = model(codes, labels=labels, **random_condition(model)).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        times = 1 + checkpointing
        assert recomputed.count("SpatialTransformerBlock") == 2 * times  # once for the prefix, once for the image
        assert recomputed.count("DepthTransformerBlock") == times
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


def test_dropout_is_for_training_only():
    model = tiny_transformer("class", dropout=0.5)
    labels = random_codes(model)
    arguments = dict(codes=masked_codes(model, labels, some_mask()), labels=labels, **random_condition(model))
    with torch.no_grad():
        reference = tiny_transformer("class")(**arguments).logits
        assert torch.equal(model(**arguments).logits, reference)
        assert not torch.allclose(model.train()(**arguments).logits, reference, atol=1e-2)


# ---- sampling inverts teacher forcing


def naive_sample(model, codes, positions, uniforms, condition, guidance_scale, temperature, top_k, top_p):
    """The sampler without a cache: all depths again by teacher forcing for each next one."""
    labels = torch.zeros_like(codes).flatten(1, 2)
    log_probs = 0
    row = torch.arange(len(codes)).unsqueeze(1)
    for depth in range(model.config.code_depth):
        stacks = labels.view_as(codes)
        logits = model(codes, positions, labels=stacks, **condition).logits[:, :, depth]
        if guidance_scale is not None:
            null = model(codes, positions, labels=stacks, **null_like(model, condition)).logits[:, :, depth]
            logits = null + guidance_scale * (logits - null)
        logits = filter_logits(logits / temperature, top_k, top_p)
        drawn, _ = sample_codes(logits.flatten(0, 1), uniforms[:, :, depth].flatten())
        drawn = drawn.view(positions.shape)
        log_probs = log_probs + logits.log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        labels[row, positions, depth] = drawn
    return labels[row, positions], log_probs


SAMPLERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 4},
    {"top_p": 0.6, "temperature": 1.3},
    {"guidance_scale": 2.5},
    {"guidance_scale": 0.0},
    {"guidance_scale": 1.8, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize(
    "condition, sampler",
    [(c, sampler) for c in CONDITIONS for sampler in SAMPLERS if c or "guidance_scale" not in sampler],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else value,
)
@pytest.mark.parametrize(
    "code_depth, shared_codebook", [(1, True), (3, True), (3, False)], ids=["VQGAN", "shared", "separate"]
)
def test_sampling_equals_the_naive_sampler(condition, code_depth, shared_codebook, sampler):
    model = tiny_transformer(condition, code_depth=code_depth, shared_codebook=shared_codebook)
    masked, arguments = some_mask(), random_condition(model)
    codes, positions = masked_codes(model, random_codes(model), masked), masked.nonzero()[:, 1].view(2, 5)
    uniforms = uniforms_for(model, 2, 5)
    sampler = {"guidance_scale": None, "temperature": 1.0, "top_k": None, "top_p": None, **sampler}
    with torch.no_grad():
        stacks, log_probs = naive_sample(model, codes, positions, uniforms, arguments, **sampler)
        rows = arguments if sampler["guidance_scale"] is None else guided(model, arguments)
        output = model(codes, positions, uniforms, **rows, **sampler)
    assert torch.equal(output.stacks, stacks)
    torch.testing.assert_close(output.log_probs, log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_guidance_of_one_is_no_guidance_and_scalars_may_be_tensors(condition):
    model = tiny_transformer(condition)
    codes, arguments = masked_codes(model, random_codes(model), some_mask()), random_condition(model)
    uniforms = uniforms_for(model, 2, 5)
    with torch.no_grad():
        plain = model(codes, uniforms=uniforms, temperature=0.8, **arguments)
        ones = model(codes, uniforms=uniforms, temperature=0.8, guidance_scale=1.0, **guided(model, arguments))
        tensors = model(
            codes,
            uniforms=uniforms,
            temperature=torch.tensor(0.8),
            guidance_scale=torch.tensor(1.0),
            **guided(model, arguments),
        )
    assert torch.equal(plain.stacks, ones.stacks) and torch.equal(tensors.stacks, ones.stacks)
    torch.testing.assert_close(plain.log_probs, ones.log_probs, rtol=0, atol=1e-4)


@conditions
def test_the_most_probable_code_needs_no_chance(condition):
    model = tiny_transformer(condition)
    codes, arguments = masked_codes(model, random_codes(model), some_mask()), random_condition(model)
    with torch.no_grad():
        samples = [model(codes, uniforms=uniforms_for(model, 2, 5, seed=i), top_k=1, **arguments) for i in range(4)]
        labels = codes.clone()
        labels.flatten(1, 2)[some_mask()] = samples[0].stacks.flatten(0, 1)
        assert not (labels == model.mask_token_id).any()
        greedy = model(codes, labels=labels, **arguments).logits.argmax(dim=-1)
    for sample in samples:
        assert torch.equal(sample.stacks, greedy) and not sample.log_probs.any()


@conditions
def test_an_image_does_not_depend_on_its_batch(condition):
    model = tiny_transformer(condition)
    codes, arguments = masked_codes(model, random_codes(model, 6), some_mask(6)), random_condition(model, 6)
    uniforms = uniforms_for(model, 6, 5)
    scale = None if condition is None else 1.5
    rows = arguments if condition is None else guided(model, arguments)
    with torch.no_grad():
        together = model(codes, uniforms=uniforms, guidance_scale=scale, **rows)
        for i in range(6):
            one = {name: value[[i]] for name, value in arguments.items()}
            one = one if condition is None else guided(model, one)
            alone = model(codes[[i]], uniforms=uniforms[[i]], guidance_scale=scale, **one)
            assert torch.equal(alone.stacks[0], together.stacks[i])
            torch.testing.assert_close(alone.log_probs[0], together.log_probs[i], rtol=0, atol=1e-4)


# ---- inverting the cumulative distribution


LAST_UNIFORM = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.mark.parametrize("codebook_size", [1, 2, 3, 50, 64, 1000, 16384])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_a_uniform_number_picks_the_code_of_its_quantile(codebook_size, spread):
    """Against `np.searchsorted` in float64. Within rounding of a boundary either side will do."""
    generator = torch.Generator().manual_seed(codebook_size)
    logits = spread * torch.randn(64, codebook_size, generator=generator)
    uniforms = torch.rand(64, generator=generator)
    uniforms[:2] = torch.tensor([0.0, LAST_UNIFORM])
    codes, log_probs = sample_codes(logits, uniforms)

    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1).numpy()
    exact = 0
    for code, row, uniform in zip(codes.tolist(), cumulative, uniforms.double().tolist(), strict=True):
        expected = min(int(np.searchsorted(row, uniform * row[-1], side="right")), codebook_size - 1)
        exact += code == expected
        below = row[code - 1] if code else 0.0
        assert below - 1e-6 <= uniform <= row[code] + 1e-6
    assert exact >= 62
    torch.testing.assert_close(
        log_probs.double(),
        logits.double().log_softmax(dim=-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_boundary_belongs_to_the_code_above_it():
    """Codes partition [0, 1) into intervals closed below; with 64 equal ones the boundaries are exact."""
    codes, _ = sample_codes(torch.zeros(64, 64), torch.arange(64) / 64)
    assert torch.equal(codes, torch.arange(64))


@pytest.mark.parametrize("codebook_size", [50, 64, 1000])
@pytest.mark.parametrize(
    "logits_of, arguments",
    [
        (lambda normal: 200 * normal, {}),  # exp underflows nearly everywhere
        (lambda normal: normal, {"top_k": 3}),
        (lambda normal: normal, {"top_p": 0.3}),
        (lambda normal: 30 * normal, {"top_k": 10, "top_p": 0.999, "temperature": 5.0}),
        (lambda normal: normal.masked_fill(normal < 0, -torch.inf), {}),
        (lambda normal: normal - 1e4, {"temperature": 0.01}),
    ],
)
def test_a_code_of_probability_zero_is_never_taken(codebook_size, logits_of, arguments):
    generator = torch.Generator().manual_seed(codebook_size)
    logits = logits_of(torch.randn(2000, codebook_size, generator=generator))
    uniforms = torch.rand(2000, generator=generator)
    uniforms[:500], uniforms[500:1000] = 0.0, LAST_UNIFORM
    codes, log_probs = sample_codes(logits, uniforms, **arguments)
    temperature = arguments.get("temperature", 1.0)
    allowed = filter_logits(logits / temperature, arguments.get("top_k"), arguments.get("top_p"))
    probabilities = allowed.softmax(dim=-1)
    assert (probabilities == 0).any(), "this case must have codes to avoid"
    assert (probabilities.gather(-1, codes.unsqueeze(-1)) > 0).all() and log_probs.isfinite().all()


@pytest.mark.parametrize("codebook_size, temperature", [(50, 1.0), (64, 1.0), (50, 0.5)])
def test_codes_follow_their_distribution(codebook_size, temperature):
    logits = temperature * torch.randn(codebook_size, generator=torch.Generator().manual_seed(1))
    draws = 20_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(2))
    codes, _ = sample_codes(logits.expand(draws, -1), uniforms, temperature=temperature)
    expected = draws * (logits.double() / temperature).softmax(dim=-1)
    observed = torch.bincount(codes, minlength=codebook_size)
    assert expected.min() > 5
    chi_square, freedom = float(((observed - expected) ** 2 / expected).sum()), codebook_size - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "top_k, top_p", [(1, None), (7, None), (50, None), (99, None), (None, 0.5), (None, 1.0), (9, 0.7)]
)
def test_filtering_keeps_the_most_probable_codes(top_k, top_p):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    kept = filter_logits(logits, top_k, top_p)
    for before, after in zip(logits.tolist(), kept.tolist(), strict=True):
        order = sorted(range(50), key=lambda code: -before[code])[:top_k]
        total, mass, expected = sum(math.exp(before[code]) for code in order), 0.0, set()
        for code in order:
            if top_p is None or mass < top_p:
                expected.add(code)
            mass += math.exp(before[code]) / total
        assert {code for code in range(50) if after[code] > -math.inf} == expected
        assert all(after[code] == before[code] for code in expected)


# ---- errors teach


def bad_calls():
    codes = torch.full((2, 4, 4, 3), 50)
    labels, uniforms = torch.zeros_like(codes), torch.zeros(2, 16, 3)
    ids, tokens, positions = torch.zeros(2).long(), torch.zeros(2, 6).long(), torch.zeros(2, 5).long()
    prefix = torch.zeros(2, 2, 2, 1, 4, 8)
    both = r"exactly one of \['class_labels', 'prefix_key_values'\]"
    return [
        ("class", dict(codes=codes, labels=labels), both + ", got none"),
        ("class", dict(codes=codes, labels=labels, input_ids=tokens), both + r", got \['input_ids'\]"),
        ("class", dict(codes=codes, labels=labels, class_labels=ids, prefix_key_values=prefix), both),
        (
            "text",
            dict(codes=codes, labels=labels, class_labels=ids),
            r"exactly one of \['input_ids', 'prefix_key_values'\]",
        ),
        (None, dict(codes=codes, labels=labels, class_labels=ids), "is unconditional and takes no condition"),
        (
            None,
            dict(codes=codes, uniforms=uniforms, guidance_scale=2.0),
            "`guidance_scale` must be None for an uncond",
        ),
        (None, dict(labels=labels), "`codes` may be left out only where"),
        ("class", dict(prefix_key_values=prefix), "`codes` may be left out only where"),
        ("class", dict(codes=codes, class_labels=ids), "exactly one of `labels` .* got neither"),
        ("class", dict(codes=codes, labels=labels, uniforms=uniforms, class_labels=ids), "got both"),
        (
            "class",
            dict(codes=codes[..., :2], labels=labels, class_labels=ids),
            r"4, 4, 3\), got torch.int64 of shape \(2, 4, 4, 2\)",
        ),
        (
            "class",
            dict(codes=codes.float(), labels=labels, class_labels=ids),
            "`codes` must be int64 .* got torch.float32",
        ),
        (
            "class",
            dict(codes=codes, labels=labels[:1], class_labels=ids),
            r"`labels` must be int64 of shape \(2, 4, .* of shape \(1, 4, 4, 3\)",
        ),
        (
            "class",
            dict(codes=codes, labels=labels, class_labels=ids, guidance_scale=2.0),
            "`guidance_scale` is for sampling",
        ),
        (
            "class",
            dict(codes=codes, labels=labels, class_labels=ids, positions=positions[:1]),
            r"`positions` .* \(2, n\), got",
        ),
        ("class", dict(codes=codes, labels=labels, class_labels=ids, positions=positions.int()), "got torch.int32"),
        (
            "class",
            dict(codes=codes, uniforms=uniforms, positions=positions, class_labels=ids),
            r"`uniforms` must have shape \(2, 5, 3\).* got \(2, 16, 3\)",
        ),
        (
            "class",
            dict(codes=codes, uniforms=uniforms[:, :1], class_labels=ids),
            r"`uniforms` must have .* got \(2, 1, 3\)",
        ),
        ("class", dict(codes=codes, uniforms=uniforms[:1, :1], class_labels=ids), r"`uniforms` .* got \(1, 1, 3\)"),
        ("class", dict(codes=codes, uniforms=uniforms[..., :2], class_labels=ids), r"`uniforms` .* got \(2, 16, 2\)"),
        ("class", dict(codes=codes, labels=codes, class_labels=ids), r"`labels` must lie in \[0, 49\], .* \[50, 50\]"),
        ("class", dict(codes=codes + 1, labels=labels, class_labels=ids), r"`codes` must lie in \[0, 50\]"),
        ("class", dict(codes=labels, labels=labels, class_labels=ids), "`codes` must have masked positions where"),
        (
            "class",
            dict(codes=codes, labels=labels, class_labels=ids + 6),
            r"`class_labels` must lie in \[0, 5\], .* \[6, 6\]",
        ),
        (
            "text",
            dict(codes=codes, labels=labels, input_ids=tokens - 1),
            r"`input_ids` must lie in \[0, 14\], .* \[-1, -1\]",
        ),
        (
            "class",
            dict(codes=codes, labels=labels, class_labels=ids, positions=positions + 16),
            r"`positions` .* \[0, 15\]",
        ),
        (
            None,
            dict(codes=codes, uniforms=uniforms, temperature=0.0),
            "`temperature` must be a positive finite number",
        ),
        (None, dict(codes=codes, uniforms=uniforms, top_k=0), "`top_k` must be an integer of at least 1, got 0"),
        (None, dict(codes=codes, uniforms=uniforms, top_p=1.5), r"`top_p` must lie in \(0, 1\], got 1.5"),
        (
            "class",
            dict(codes=codes, uniforms=uniforms, prefix_key_values=prefix[:1]),
            r"`prefix_key_values` must be .*\(2, 2, batch_size,",
        ),
        ("class", dict(codes=codes, labels=labels, class_labels=ids.view(2, 1)), r"`class_labels` .* \(2, 1\)"),
        ("class", dict(codes=codes, labels=labels, class_labels=ids.float()), "`class_labels` .* got torch.float32"),
        (
            "text",
            dict(codes=codes, labels=labels, input_ids=tokens[:, :4]),
            r"`input_ids` .*\(batch_size, 6\).* of shape \(2, 4\)",
        ),
        ("class", dict(codes=codes, labels=labels, class_labels=ids[:1]), r"`class_labels` must have 2 rows .* got 1"),
        (
            "class",
            dict(codes=codes, uniforms=uniforms, class_labels=ids, guidance_scale=2.0),
            r"`class_labels` must have 4 rows .*twice the batch.* got 2",
        ),
    ]


@pytest.mark.parametrize("condition, arguments, message", bad_calls())
def test_a_call_that_makes_no_sense_is_refused(condition, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(condition)(**arguments)


@pytest.mark.parametrize(
    "config, message",
    [
        *(({name: 0}, f"`{name}` must be at least 1, got 0") for name in SIZES),
        ({"num_depth_layers": 0}, "`num_depth_layers` must be at least 1 with `code_depth` 4, got 0"),
        ({"num_classes": 5, "text_vocab_size": 7}, "not both: got 5 and 7"),
        ({"text_loss_weight": 1.5}, r"`text_loss_weight` must lie in \[0, 1\], got 1.5"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ContextualRQTransformerModel(**config)


def test_another_codebook_is_copied_and_one_that_does_not_fit_is_refused():
    model = tiny_transformer(None)
    other = torch.randn(1, 51, 16)
    model.set_codebook(other)
    assert torch.equal(model.codebook, other) and model.codebook is not other
    with pytest.raises(ValueError, match=r"`codebook` must have shape \(1, 51, 16\), got \(3, 51, 16\)"):
        model.set_codebook(torch.zeros(3, 51, 16))
