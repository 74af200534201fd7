"""The RQ-VAE: quantizing is the paper's recursion, decoding its inverse, and the codebook learns without surprises."""

import math

import pytest
import torch
import torch.nn.functional as F
from components import random_codes, random_pixels, seeded, tiny_vae

from rq_draft_revise import RQVAEModel
from rq_draft_revise.rqvae import ResidualQuantizer


VARIANTS = {
    "shared": {},
    "separate": {"shared_codebook": False},
    "VQGAN": {"code_depth": 1},
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def book_of(quantizer: ResidualQuantizer, depth: int) -> torch.Tensor:
    """Codebook of a depth without its padding row, in float64."""
    books = quantizer.codebook.double()
    return books[depth if len(books) > 1 else 0, :-1]


def quantize_reference(quantizer: ResidualQuantizer, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The recursion as the paper writes it, vector by vector in float64: codes `(n, D)` and z^(d) `(n, D, dim)`."""
    all_codes, all_sums = [], []
    for z in vectors.double():
        residual, total, codes, sums = z, torch.zeros_like(z), [], []
        for depth in range(quantizer.depth):
            book = book_of(quantizer, depth)
            code = int((residual - book).norm(dim=-1).argmin())
            residual, total = residual - book[code], total + book[code]
            codes.append(code)
            sums.append(total)
        all_codes.append(torch.tensor(codes))
        all_sums.append(torch.stack(sums))
    return torch.stack(all_codes), torch.stack(all_sums)


def flat(latents: torch.Tensor) -> torch.Tensor:
    """`(B, C, h, w)` -> `(B·h·w, C)`."""
    return latents.permute(0, 2, 3, 1).flatten(end_dim=-2)


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ---- the published model


def test_the_imagenet_model_has_the_published_number_of_parameters():
    """104,402,051 count the codebook once, with its padding row; here it is a buffer. The averages from which it
    learns are no part of the model that is used, and are not counted."""
    with torch.device("meta"):
        vae = RQVAEModel()
    assert vae.quantizer.codebook.shape == (1, 16384 + 1, 256)
    assert {name for name, _ in vae.named_buffers()} == {
        f"quantizer.{n}" for n in ("codebook", "ema_counts", "ema_sums")
    }
    assert sum(p.numel() for p in vae.parameters()) + vae.quantizer.codebook.numel() == 104_402_051
    assert vae.spatial_scale_factor == 32 and vae.mask_token_id == 16384


# ---- quantizing


@variants
def test_quantizing_is_the_recursion_of_the_paper(config):
    vae = tiny_vae(**config)
    with torch.no_grad():
        output = vae(random_pixels(4))
    vectors = flat(output.latents)
    codes, sums = quantize_reference(vae.quantizer, vectors)
    assert torch.equal(output.codes.flatten(end_dim=-2), codes)
    assert codes.unique().numel() > 10, "the law says little about a codebook of which one code is used"

    for depth in range(1, vae.config.code_depth + 1):
        ours = flat(vae.embed_codes(output.codes, depth=depth))
        torch.testing.assert_close(
            (vectors - ours).norm(dim=-1).double(), (vectors - sums[:, depth - 1]).norm(dim=-1), rtol=1e-5, atol=1e-6
        )
    loss = torch.stack([(vectors - z).square().mean() for z in sums.unbind(dim=1)]).mean()
    torch.testing.assert_close(output.commitment_loss.double(), loss, rtol=1e-5, atol=0)


@variants
def test_decoding_the_codes_gives_what_forward_gives(config):
    vae = tiny_vae(**config)
    pixels = random_pixels(3)
    with torch.no_grad():
        output, encoded = vae(pixels), vae.encode(pixels)
        assert torch.equal(encoded.codes, output.codes) and torch.equal(encoded.latents, output.latents)
        quantized, _, _ = vae.quantizer(encoded.latents.permute(0, 2, 3, 1))
        torch.testing.assert_close(vae.embed_codes(encoded.codes), quantized.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
        torch.testing.assert_close(vae.decode(encoded.codes).sample, output.sample, rtol=0, atol=1e-5)
    assert output.sample.shape == pixels.shape and encoded.codes.shape == (3, 4, 4, vae.config.code_depth)


@variants
def test_decoding_to_a_depth_leaves_out_what_lies_deeper(config):
    """A stack cannot be masked in part, so the shallower sum is made by hand."""
    vae = tiny_vae(**config)
    codes = random_codes(vae)
    for depth in range(1, vae.config.code_depth + 1):
        vectors = sum(book_of(vae.quantizer, d)[codes[..., d]] for d in range(depth))  # (B, h, w, C)
        with torch.no_grad():
            by_hand = vae.decoder(vae.post_quant_conv(vectors.float().permute(0, 3, 1, 2)))
            torch.testing.assert_close(vae.decode(codes, depth=depth).sample, by_hand, rtol=0, atol=1e-5)
    assert torch.equal(vae.embed_codes(codes), vae.embed_codes(codes, depth=vae.config.code_depth))


@variants
def test_a_masked_position_decodes_as_the_zero_vector(config):
    vae = tiny_vae(**config)
    codes = random_codes(vae)
    masked = codes.clone()
    masked[0, 1, 2] = masked[1, 0] = vae.mask_token_id
    vectors, expected = vae.embed_codes(masked), vae.embed_codes(codes)
    expected[0, :, 1, 2] = expected[1, :, 0] = 0
    assert torch.equal(vectors, expected)
    with torch.no_grad():
        from_nothing = vae.decoder(vae.post_quant_conv(torch.zeros(2, 16, 4, 4)))
        undrafted = vae.decode(torch.full_like(codes, vae.mask_token_id)).sample
    torch.testing.assert_close(undrafted, from_nothing, rtol=0, atol=1e-5)


def test_without_attention_in_the_middle_neither_half_has_any():
    vae = tiny_vae(mid_block_add_attention=False)
    for half in (vae.encoder, vae.decoder):
        assert not [attention for attention in half.mid_block.attentions if attention is not None]


def test_patches_are_channels():
    """`patch_size` rearranges pixels before and after the same network."""
    patched = tiny_vae(patch_size=2)
    plain = tiny_vae(in_channels=12, out_channels=12)
    plain.load_state_dict(patched.state_dict())
    pixels = random_pixels(2, size=16)
    with torch.no_grad():
        ours, reference = patched(pixels), plain(F.pixel_unshuffle(pixels, 2))
    assert patched.spatial_scale_factor == 4 and torch.equal(ours.codes, reference.codes)
    assert torch.equal(ours.sample, F.pixel_shuffle(reference.sample, 2))


# ---- gradients


def test_gradients_pass_straight_to_the_encoder_and_never_to_the_codebook():
    quantizer = tiny_vae().quantizer
    with seeded(1):
        z, weight = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16)
    quantized, _, commitment_loss = quantizer(z)
    (quantized * weight).sum().backward()
    assert torch.equal(z.grad, weight)

    z.grad = None
    quantizer(z)[2].backward()
    _, sums = quantize_reference(quantizer, z.detach())
    by_hand = 2 * (z.detach().unsqueeze(1) - sums).mean(dim=1) / z.numel()
    torch.testing.assert_close(z.grad.double(), by_hand, rtol=1e-4, atol=1e-8)
    assert not list(quantizer.parameters()) and not any(buffer.requires_grad for buffer in quantizer.buffers())


def test_every_parameter_is_trained_and_training_forward_changes_no_buffer():
    """An unused parameter breaks DDP; a buffer that changed in `forward` would break gradient accumulation."""
    vae = tiny_vae().train()
    before = state_of(vae)
    output = vae(random_pixels())
    (output.sample.square().mean() + output.commitment_loss).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


# ---- soft codes


@variants
def test_soft_codes_are_the_softmax_of_the_distances(config):
    vae = tiny_vae(**config)
    pixels, tau = random_pixels(2), 0.3
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        hard = vae.soft_codes(pixels, tau)
        drawn = vae.soft_codes(pixels, tau, stochastic=True, generator=generator)
        encoded = vae.encode(pixels)
        cold = vae.soft_codes(pixels, tau=1e-7)
    assert torch.equal(hard.codes, encoded.codes) and not torch.equal(drawn.codes, encoded.codes)
    for output in (hard, drawn):
        residual = flat(encoded.latents).double()
        for depth in range(vae.config.code_depth):
            book = book_of(vae.quantizer, depth)
            expected = torch.softmax(-torch.cdist(residual, book).square() / tau, dim=-1)
            probabilities = output.probabilities[..., depth, :].flatten(end_dim=-2).double()
            torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(
                probabilities.sum(dim=-1), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-6
            )
            residual = residual - book[output.codes[..., depth].flatten()]
    torch.testing.assert_close(cold.probabilities, F.one_hot(encoded.codes, 50).float(), rtol=0, atol=1e-3)


def test_stochastic_codes_follow_their_probabilities():
    vae = tiny_vae(codebook_size=8, code_depth=2)
    draws = 500
    pixels = random_pixels(1).repeat(draws, 1, 1, 1)
    with torch.no_grad():
        output = vae.soft_codes(pixels, tau=2.0, stochastic=True, generator=torch.Generator().manual_seed(0))
    expected = draws * output.probabilities[0, ..., 0, :]  # (4, 4, 8)
    observed = F.one_hot(output.codes[..., 0], 8).sum(dim=0)
    assert expected.min() > 5
    chi_square, freedom = float(((observed - expected) ** 2 / expected).sum()), 16 * 7
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_stochastic_codes_come_from_the_generator_alone():
    vae, pixels = tiny_vae(), random_pixels(1)

    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return vae.soft_codes(pixels, tau=2.0, stochastic=True, generator=generator).codes

    before = torch.get_rng_state()
    codes = drawn(1)
    assert torch.equal(drawn(1), codes) and not torch.equal(drawn(2), codes)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_must_be_positive_and_finite(tau):
    with pytest.raises(ValueError, match="`tau` must be positive and finite"):
        tiny_vae().soft_codes(random_pixels(), tau=tau)


# ---- the codebook learns


def update_reference(quantizer: ResidualQuantizer, state: dict, batch: torch.Tensor) -> dict:
    """The moving averages without restarts, in float64: N ← γN + (1-γ)n, m ← γm + (1-γ)Σr, e = m/N."""
    decay, books = quantizer.ema_decay, len(state["codebook"])
    counts, sums = torch.zeros_like(state["ema_counts"]), torch.zeros_like(state["ema_sums"])
    for z in batch.double():
        residual = z
        for depth in range(quantizer.depth):
            book = state["codebook"][depth if books > 1 else 0, :-1]
            code = int((residual - book).norm(dim=-1).argmin())
            counts[depth if books > 1 else 0, code] += 1
            sums[depth if books > 1 else 0, code] += residual
            residual = residual - book[code]
    state = {
        "codebook": state["codebook"].clone(),
        "ema_counts": decay * state["ema_counts"] + (1 - decay) * counts,
        "ema_sums": decay * state["ema_sums"] + (1 - decay) * sums,
    }
    seen = state["ema_counts"] > 0
    state["codebook"][:, :-1][seen] = (state["ema_sums"] / state["ema_counts"].unsqueeze(-1))[seen]
    return state


@variants
def test_the_codebook_follows_moving_averages(config):
    vae = tiny_vae(**config, codebook_size=6, ema_decay=0.9, restart_threshold=0.0)
    state = {name: tensor.double() for name, tensor in vae.quantizer.state_dict().items()}
    for step in range(4):
        with seeded(step):
            latents = 0.5 * torch.randn(2, 16, 4, 4)
        state = update_reference(vae.quantizer, state, flat(latents))
        vae.update_codebook(latents)
        for name, tensor in vae.quantizer.state_dict().items():
            torch.testing.assert_close(tensor.double(), state[name], rtol=1e-4, atol=1e-5, msg=f"{name}, step {step}")
        assert not vae.quantizer.codebook[:, -1].any(), "the mask must go on embedding as nothing"


def test_a_code_that_nothing_uses_stays_where_it_was_however_long():
    vae = tiny_vae(codebook_size=3, code_depth=1, latent_channels=2, norm_num_groups=2, ema_decay=0.5,
                   restart_threshold=0.0)  # fmt: skip
    quantizer = vae.quantizer
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [7.0, -5.0]])
    quantizer.codebook[0, :-1], quantizer.ema_sums[0] = vectors, vectors
    quantizer.ema_counts.fill_(1)
    for _ in range(200):  # 2^-149 is the smallest float32
        vae.update_codebook(vectors[:2].T.reshape(1, 2, 2, 1))
    torch.testing.assert_close(quantizer.codebook[0, :-1], vectors)


@variants
def test_restarted_codes_lie_on_vectors_of_the_batch_and_have_an_even_share(config):
    """No code has a history at first, so the first update restarts as many as there are vectors to move onto."""
    vae = tiny_vae(**config, codebook_size=200, restart_threshold=0.5)
    with seeded(0):
        latents = torch.randn(1, 16, 4, 4)
    inputs, residual = [], flat(latents)
    for depth, code in enumerate(quantize_reference(vae.quantizer, residual)[0].T):
        inputs.append(residual)
        residual = residual - book_of(vae.quantizer, depth)[code].float()
    before = vae.quantizer.codebook.clone()
    output = vae.update_codebook(latents, generator=torch.Generator().manual_seed(0))

    books = len(before)
    pools = [torch.cat(inputs)] if books == 1 else inputs
    restarted = 0
    for book, pool in enumerate(pools):
        codebook = vae.quantizer.codebook[book, :-1]
        distances = torch.cdist(codebook.double(), pool.double())
        on_a_vector = distances.amin(dim=-1) < 1e-5
        share = len(pool) / 200
        fresh = on_a_vector & torch.isclose(vae.quantizer.ema_counts[book], torch.tensor(share))
        restarted += int(fresh.sum())
        assert fresh.sum() == len(pool)
        assert distances[fresh].argmin(dim=-1).unique().numel() == len(pool), "each vector takes one code"
        torch.testing.assert_close(vae.quantizer.ema_sums[book, fresh], share * codebook[fresh])
        untouched = ~fresh & (vae.quantizer.ema_counts[book] == 0)
        assert torch.equal(codebook[untouched], before[book, :-1][untouched])
    assert int(output.num_restarted) == restarted
    assert not vae.quantizer.codebook[:, -1].any()


def test_one_image_after_the_other_is_the_batch():
    vae, pixels = tiny_vae(), random_pixels(3)
    with torch.no_grad():
        codes, whole = vae.encode(pixels).codes, vae(pixels).sample
        vae.enable_slicing()
        assert torch.equal(vae.encode(pixels).codes, codes)
        torch.testing.assert_close(vae.decode(codes).sample, whole)
        sizes = []
        vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        vae.decode(codes)
        vae.disable_slicing()
        vae.decode(codes)
    assert sizes == [1, 1, 1, 3]


def test_micro_batches_update_the_codebook_exactly_as_the_large_batch():
    with seeded(0):
        batches = [torch.randn(size, 16, 4, 4) for size in (2, 1, 3)]
    states = []
    for latents in (batches, torch.cat(batches)):
        vae = tiny_vae()
        for step in range(3):
            vae.update_codebook(latents, generator=torch.Generator().manual_seed(step))
        states.append(state_of(vae.quantizer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["codebook"], tiny_vae().quantizer.codebook)


def test_usage_and_perplexity_are_those_of_the_codes_of_the_batch():
    vae = tiny_vae(code_depth=2, codebook_size=10)
    with seeded(0):
        latents = torch.randn(2, 16, 4, 4)
    codes, _ = quantize_reference(vae.quantizer, flat(latents))
    output = vae.update_codebook(latents)
    for depth in range(2):
        shares = torch.bincount(codes[:, depth], minlength=10).double() / len(codes)
        entropy = -sum(p * math.log(p) for p in shares.tolist() if p)
        assert float(output.usage[depth]) == pytest.approx(float((shares > 0).double().mean()))
        assert float(output.perplexity[depth]) == pytest.approx(math.exp(entropy), rel=1e-5)


@variants
def test_a_code_is_unused_by_its_share_of_the_batch(config):
    """Twice the vectors, with twice the history behind them, restart the same codes."""
    with seeded(0):
        latents, shares = torch.randn(8, 16, 4, 4), torch.rand(50)
    restarted = []
    for times in (1, 2):
        vae = tiny_vae(**config, restart_threshold=0.5)
        quantizer = vae.quantizer
        share = times * 128 / 50 * (vae.config.code_depth if len(quantizer.codebook) == 1 else 1)
        quantizer.ema_counts.copy_(share * shares)
        quantizer.ema_sums.copy_(quantizer.ema_counts.unsqueeze(-1) * quantizer.codebook[:, :-1])
        output = vae.update_codebook([latents] * times)
        restarted.append(torch.isclose(quantizer.ema_counts, torch.tensor(share)))
        assert int(output.num_restarted) == restarted[-1].sum() > 10
    assert torch.equal(*restarted)


def train_codebook(restart_threshold: float) -> tuple[float, float, float]:
    """200 updates at batch 8 on a fixed mixture: share of the 512 codes restarted a step, and the quantization error
    on the batch just learned from and on fresh ones, means over the last 50 steps."""
    vae = tiny_vae(codebook_size=512, restart_threshold=restart_threshold)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(64, 16, generator=generator)

    def batch():
        component = torch.randint(64, (8 * 16,), generator=generator)
        vectors = centers[component] + 0.3 * torch.randn(8 * 16, 16, generator=generator)
        return vectors.view(8, 4, 4, 16).permute(0, 3, 1, 2)

    def error(latents):
        return float((flat(latents) - vae.quantizer(flat(latents))[0]).square().mean())

    restarts, train, fresh = 0.0, 0.0, 0.0
    for step in range(200):
        latents = batch()
        output = vae.update_codebook(latents, generator=generator)
        if step >= 150:
            restarts += int(output.num_restarted) / 512 / 50
            train += error(latents) / 50
            fresh += error(batch()) / 50
    return restarts, train, fresh


def test_small_batches_do_not_restart_the_codebook_for_ever():
    """128 vectors of 3 depths are 0.75 a code, and the threshold is a fraction of that. An absolute "count < 1" (here
    1/0.75 of a share) finds most codes unused at every step and moves them onto the batch at hand: it then fits that
    batch, the training error looks fine, and the next batch is a surprise."""
    restarts, train, fresh = train_codebook(restart_threshold=0.01)
    assert restarts < 0.02
    assert fresh < 1.2 * train

    even_share = 8 * 16 * 3 / 512
    restarts, absolute_train, absolute_fresh = train_codebook(restart_threshold=1 / even_share)
    assert restarts > 0.3
    assert absolute_train < train and absolute_fresh > 2 * absolute_train


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_and_quantizes_in_float32(dtype, tmp_path):
    """Codes are those of a float64 computation on the half-precision latents: no near-tie is moved by the dtype."""
    tiny_vae().save_pretrained(tmp_path)
    vae = RQVAEModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert vae.dtype == dtype and vae.quantizer.codebook.dtype == torch.float32
    with torch.no_grad():
        encoded = vae.encode(random_pixels(16).to(dtype))
        sample = vae.decode(encoded.codes).sample
        output = vae(random_pixels(16).to(dtype))
    assert encoded.latents.dtype == sample.dtype == output.sample.dtype == dtype
    assert sample.isfinite().all() and output.sample.isfinite().all() and output.commitment_loss.isfinite()
    assert torch.equal(encoded.codes.flatten(end_dim=-2), quantize_reference(vae.quantizer, flat(encoded.latents))[0])


def test_autocast_leaves_quantizer_and_averages_in_float32():
    vae, plain = tiny_vae().train(), tiny_vae()
    pixels = random_pixels(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae(pixels)
        latents = output.latents.detach()
        soft = vae.soft_codes(pixels)
        vae.update_codebook(latents, generator=torch.Generator().manual_seed(0))
        (output.sample.float().square().mean() + output.commitment_loss).backward()
    assert (
        latents.dtype == torch.bfloat16 and soft.probabilities.dtype == output.commitment_loss.dtype == torch.float32
    )
    codes, _ = quantize_reference(plain.quantizer, flat(latents))
    assert torch.equal(output.codes.flatten(end_dim=-2), codes)
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    plain.update_codebook(latents.float(), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(vae.quantizer.buffers(), plain.quantizer.buffers(), strict=True))


# ---- errors teach


CODES = torch.zeros(1, 4, 4, 3, dtype=torch.int64)


def changed(codes: torch.Tensor, value: int, whole: bool) -> torch.Tensor:
    codes = codes.clone()
    codes[0, 0, 0, slice(None) if whole else 0] = value
    return codes


@pytest.mark.parametrize(
    "codes, depth, message",
    [
        (CODES.tolist(), None, "`codes` must be a torch.Tensor of int64, got list"),
        (CODES.int(), None, "`codes` must have dtype torch.int64, got torch.int32"),
        (CODES[..., :2], None, r"`codes` must have shape \(batch_size, height, width, 3\), got \(1, 4, 4, 2\)"),
        (CODES[0], None, r"got \(4, 4, 3\)"),
        (CODES[:0], None, "`codes` must not be empty"),
        (changed(CODES, 51, whole=True), None, r"`codes` must lie in \[0, 50\] \(50 is the mask\).*\[0, 51\]"),
        (changed(CODES, -1, whole=True), None, r"got values in \[-1, 0\]"),
        (changed(CODES, 50, whole=False), None, r"`codes` must be masked in whole stacks, but 1 position"),
        (CODES, 0, r"`depth` must be an integer in \[1, 3\], got 0"),
        (CODES, 4, r"`depth` must be an integer in \[1, 3\], got 4"),
        (CODES, 1.5, r"`depth` must be an integer in \[1, 3\], got 1.5"),
    ],
)
def test_what_is_no_code_map_is_refused(codes, depth, message):
    for method in (tiny_vae().decode, tiny_vae().embed_codes):
        with pytest.raises(ValueError, match=message):
            method(codes, depth=depth)


@pytest.mark.parametrize(
    "pixels, message",
    [
        ([[0.0]], "`pixel_values` must be a floating-point torch.Tensor .*got list"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 1, 8, 8), r"`pixel_values` must have shape \(batch_size, 3, .* got \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 7), r"multiples of 2, got \(1, 3, 8, 7\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
    ],
)
def test_what_is_no_image_is_refused(pixels, message):
    vae = tiny_vae()
    for method in (vae, vae.encode, vae.soft_codes):
        with pytest.raises(ValueError, match=message):
            method(pixels)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"down_block_types": ("DownEncoderBlock2D",)},
            r"one block a level of `block_out_channels` \(2\), got 1 and 2",
        ),
        ({"codebook_size": 0}, "`codebook_size` must be at least 1, got 0"),
        ({"code_depth": 0}, "`code_depth` must be at least 1, got 0"),
        ({"restart_threshold": -0.1}, "`restart_threshold` must not be negative, got -0.1"),
        ({"ema_decay": 1.0}, r"`ema_decay` must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_vae(**config)


def test_an_update_without_latents_is_refused():
    with pytest.raises(ValueError, match="`latents` must hold at least one tensor, got an empty list"):
        tiny_vae().update_codebook([])
