"""Converted checkpoints compute what the original ones do; what the original is stands in `original_models`."""

import json
import sys
from pathlib import Path

import original_models as original
import pytest
import torch
import yaml
from components import random_codes, random_pixels

from rq_draft_revise import RQTransformerModel, RQTransformerPipeline, RQVAEModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion_scripts"))

import conversion  # noqa: E402
import convert_archive  # noqa: E402
import convert_rq_transformer_to_diffusers as rq_transformer_script  # noqa: E402
import convert_rqvae_to_diffusers as rqvae_script  # noqa: E402
import convert_vqgan_to_diffusers as vqgan_script  # noqa: E402


# What float64 leaves of the difference between two orders of summation.
EXACT = dict(rtol=1e-9, atol=1e-9)


def write_stage(folder, config, state_dict, name="state_dict"):
    """A folder as in the archives: `model.pt` and `config.yaml`."""
    folder.mkdir(parents=True)
    torch.save({"epoch": 10, name: state_dict, "optimizer": {"state": {0: torch.ones(2)}}}, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "model.pt"


def same_state_dicts(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


def read(path, name="state_dict"):
    return torch.load(path, weights_only=True)[name]


# ---- RQ-VAE ----


def check_rqvae(vae, state_dict, config, pixels):
    """Latents, codes and reconstructions in float64; returns their differences in float32."""
    arch = config["arch"]
    code_depth = arch["hparams"]["code_shape"][2]
    vae.double()
    weights = original.doubles(state_dict)
    latents = original.encode(weights, arch["ddconfig"], pixels.double())
    codes, quantized = original.quantize(original.rqvae_books(weights, code_depth), latents)
    sample = original.decode(weights, arch["ddconfig"], quantized)
    with torch.no_grad():
        encoded = vae.encode(pixels.double())
        torch.testing.assert_close(encoded.latents, latents, **EXACT)
        assert torch.equal(encoded.codes, codes)
        torch.testing.assert_close(vae.embed_codes(codes), quantized, **EXACT)
        torch.testing.assert_close(vae.decode(codes).sample, sample, **EXACT)
        vae.float()
        single = vae.encode(pixels)
        flipped = (single.codes != codes).float().mean()
        return (
            float((single.latents - latents).abs().max()),
            float((vae.decode(codes).sample - sample).abs().max()),
            float(flipped),
        )


@pytest.mark.parametrize("shared", [True, False])
def test_rqvae_computes_what_the_original_does(tmp_path, shared):
    config = original.rqvae_config(shared_codebook=shared)
    state_dict = original.random_rqvae(config)
    checkpoint = write_stage(tmp_path / "stage1", config, state_dict)
    rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "vae")])

    vae = RQVAEModel.from_pretrained(tmp_path / "vae").eval()
    assert vae.quantizer.codebook.shape[0] == (1 if shared else 3)
    latent_error, sample_error, flipped = check_rqvae(vae, state_dict, config, random_pixels(size=16))
    assert latent_error < 1e-4
    assert sample_error < 1e-4
    assert flipped < 0.05  # near-ties

    arguments = ["--checkpoint_path", str(tmp_path / "vae"), "--output_dir", str(tmp_path / "back"), "--to_original"]
    rqvae_script.main([*arguments, "--config_path", str(checkpoint.with_name("config.yaml"))])
    same_state_dicts(read(tmp_path / "back" / "model.pt"), state_dict)
    assert yaml.safe_load((tmp_path / "back" / "config.yaml").read_text()) == config


@pytest.mark.slow
def test_rqvae_at_full_imagenet_size(tmp_path):
    # Every key and shape of the published model; computed at 64×64 pixels, which is 2×2 code stacks.
    config = original.rqvae_config(original.IMAGENET_AUTOENCODER, n_embed=16384, code_depth=4)
    state_dict = original.random_rqvae(config)
    unique = {value.data_ptr(): value.numel() for key, value in state_dict.items() if "_ema" not in key}
    assert sum(unique.values()) == 104_402_051
    checkpoint = write_stage(tmp_path / "stage1", config, state_dict)
    rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "vae")])
    vae = RQVAEModel.from_pretrained(tmp_path / "vae").eval()
    latent_error, sample_error, flipped = check_rqvae(vae, state_dict, config, random_pixels(1, size=64))
    print(f"float32: latents {latent_error:.1e}, reconstruction {sample_error:.1e}, codes flipped {flipped:.1%}")
    assert latent_error < 1e-4
    assert sample_error < 1e-4


def test_padding_row_becomes_zero_and_is_named(tmp_path, capsys):
    config = original.rqvae_config()
    state_dict = original.random_rqvae(config)
    state_dict["quantizer.codebooks.0.weight"][-1] = 1.0
    checkpoint = write_stage(tmp_path / "stage1", config, state_dict)
    rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "vae")])
    assert not RQVAEModel.from_pretrained(tmp_path / "vae").quantizer.codebook[:, -1].any()
    assert "the last row of quantizer.codebooks.0.weight" in capsys.readouterr().out


# ---- RQ-Transformer ----

CONDITIONS = {
    "none": dict(vocab_size_cond=1, block_size_cond=1),
    "class": dict(vocab_size_cond=7, block_size_cond=1),
    "text": dict(vocab_size_cond=40, block_size_cond=6),
}


def convert_both_stages(tmp_path, config, rqvae_config, **arguments):
    """A pair of stages with random weights, converted; returns their state dicts."""
    state_dict = original.random_weights(original.rq_transformer_shapes(config))
    rqvae = original.random_rqvae(rqvae_config)
    write_stage(tmp_path / "stage1", rqvae_config, rqvae)
    checkpoint = write_stage(tmp_path / "stage2", config, state_dict)
    folder = tmp_path / "transformer"
    folder.mkdir()
    rqvae_path = tmp_path / "stage1" / "model.pt"
    rq_transformer_script.convert_rq_transformer(
        checkpoint, checkpoint.with_name("config.yaml"), folder, rqvae_path, **arguments
    )
    return state_dict, rqvae


def check_transformer(transformer, state_dict, config, rqvae, codes):
    """Logits in float64; returns the largest difference in float32."""
    arch = config["arch"]
    shape = (codes.shape[0], arch["block_size_cond"])
    condition = torch.randint(arch["vocab_size_cond"], shape, generator=torch.Generator().manual_seed(1))
    arguments = {}
    if arch["block_size_cond"] > 1:
        arguments = {"input_ids": condition}
    elif arch["vocab_size_cond"] > 1:
        arguments = {"class_labels": condition[:, 0]}
    books = original.rqvae_books(original.doubles(rqvae), arch["block_size"][2])
    logits, text_logits = original.rq_transformer_logits(original.doubles(state_dict), config, books, codes, condition)
    with torch.no_grad():
        output = transformer.double()(labels=codes, **arguments)
        torch.testing.assert_close(output.logits, logits, **EXACT)
        if text_logits is not None:
            torch.testing.assert_close(output.text_logits, text_logits, **EXACT)
        return float((transformer.float()(labels=codes, **arguments).logits - logits).abs().max())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_rq_transformer_computes_what_the_original_does(tmp_path, condition, shared):
    config = original.rq_transformer_config(**CONDITIONS[condition])
    rqvae_config = original.rqvae_config(shared_codebook=shared)
    state_dict, rqvae = convert_both_stages(tmp_path, config, rqvae_config)
    transformer = RQTransformerModel.from_pretrained(tmp_path / "transformer").eval()
    error = check_transformer(transformer, state_dict, config, rqvae, random_codes(transformer))
    assert error < 1e-4

    arguments = ["--checkpoint_path", str(tmp_path / "transformer"), "--output_dir", str(tmp_path / "back")]
    rq_transformer_script.main([*arguments, "--to_original"])
    same_state_dicts(read(tmp_path / "back" / "model.pt"), state_dict)


@pytest.mark.slow
def test_rq_transformer_at_full_width(tmp_path):
    # Width, heads, codebook and classes of the published 1.4B model, in 1 + 1 of its 42 + 6 equal blocks.
    config = original.rq_transformer_config(
        embed_dim=1536, heads=24, body=1, head=1, block_size=(8, 8, 4), vocab_size=16384, input_embed_dim=256,
        vocab_size_cond=1000,
    )  # fmt: skip
    rqvae_config = original.rqvae_config(original.autoencoder_settings(z_channels=256), n_embed=16384, code_depth=4)
    state_dict, rqvae = convert_both_stages(tmp_path, config, rqvae_config)
    transformer = RQTransformerModel.from_pretrained(tmp_path / "transformer").eval()
    error = check_transformer(transformer, state_dict, config, rqvae, random_codes(transformer, batch_size=1))
    print(f"float32: logits {error:.1e}")
    assert error < 1e-3


def test_averaged_weights_are_taken_when_asked_for(tmp_path):
    config, rqvae_config = original.rq_transformer_config(), original.rqvae_config()
    rqvae_path = write_stage(tmp_path / "stage1", rqvae_config, original.random_rqvae(rqvae_config))
    shapes = original.rq_transformer_shapes(config)
    both = {"state_dict": original.random_weights(shapes, 0), "state_dict_ema": original.random_weights(shapes, 1)}
    checkpoint = write_stage(tmp_path / "stage2", config, {})
    torch.save(both, checkpoint)
    for flags, name in (([], "state_dict"), (["--ema"], "state_dict_ema")):
        output, back = tmp_path / name, tmp_path / f"{name}-back"
        arguments = ["--rqvae_path", str(rqvae_path), "--checkpoint_path", str(checkpoint)]
        rq_transformer_script.main([*arguments, "--output_dir", str(output), *flags])
        rq_transformer_script.main(
            ["--checkpoint_path", str(output), "--output_dir", str(back), "--to_original", *flags]
        )
        same_state_dicts(read(back / "model.pt", name), both[name])


def test_shards_are_written_one_at_a_time_and_load(tmp_path, monkeypatch):
    written = []

    def save_file(tensors, path, metadata):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, path, metadata)

    save = conversion.save_file
    monkeypatch.setattr(conversion, "save_file", save_file)
    config, rqvae_config = original.rq_transformer_config(**CONDITIONS["text"]), original.rqvae_config()
    state_dict, rqvae = convert_both_stages(tmp_path, config, rqvae_config, max_shard_size="50KB")
    assert len(written) > 4
    assert max(written) <= 50_000
    transformer = RQTransformerModel.from_pretrained(tmp_path / "transformer").eval()
    check_transformer(transformer, state_dict, config, rqvae, random_codes(transformer))
    restored = rq_transformer_script.restore_rq_transformer(tmp_path / "transformer")
    same_state_dicts(restored, state_dict)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_rounds_the_weights_and_spares_the_codebook_of_the_rqvae(tmp_path, dtype):
    config = original.rqvae_config()
    state_dict = original.random_rqvae(config)
    checkpoint = write_stage(tmp_path / "stage1", config, state_dict)
    arguments = ["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "vae"), "--dtype", dtype]
    rqvae_script.main(arguments)
    back = rqvae_script.restore_rqvae(tmp_path / "vae")
    for key, value in state_dict.items():
        exact = key.startswith("quantizer")
        assert torch.equal(back[key], value if exact else value.to(getattr(torch, dtype)).float()), key


# ---- The published sizes ----

# name -> body, head, width, heads, codebook, condition, and top_k and top_p of the config. From the authors' configs;
# the last has none in their repository, and its 64 tokens are a guess.
PUBLISHED = {
    "rq-ffhq-256-355m": (24, 4, 1024, 16, 2048, (1, 1), (250, 1.0)),
    "rq-lsun-church-256-370m": (24, 4, 1024, 16, 16384, (1, 1), (250, 1.0)),
    "rq-lsun-cat-256-612m": (26, 4, 1280, 20, 16384, (1, 1), (250, 1.0)),
    "rq-lsun-bedroom-256-612m": (26, 4, 1280, 20, 16384, (1, 1), (250, 1.0)),
    "rq-imagenet-256-480m": (12, 4, 1536, 24, 16384, (1000, 1), (16384, 0.92)),
    "rq-imagenet-256-821m": (24, 4, 1536, 24, 16384, (1000, 1), (16384, 0.92)),
    "rq-imagenet-256-1.4b": (42, 6, 1536, 24, 16384, (1000, 1), (16384, 0.92)),
    "rq-imagenet-256-3.8b": (42, 6, 2560, 40, 16384, (1000, 1), (16384, 0.92)),
    "rq-cc3m-256-654m": (26, 4, 1280, 20, 16384, (16384, 32), (16384, 0.7)),
    "rq-text-to-image-256-3.9b": (42, 6, 2560, 40, 16384, (16384, 64), (1024, 0.95)),
}


def published_config(name):
    body, head, width, heads, codebook, (vocabulary, length), (top_k, top_p) = PUBLISHED[name]
    return original.rq_transformer_config(
        embed_dim=width, heads=heads, body=body, head=head, block_size=(8, 8, 4), vocab_size=codebook,
        input_embed_dim=256, vocab_size_cond=vocabulary, block_size_cond=length,
        sampling={"temp": 1.0, "top_k": [top_k], "top_p": [top_p]},
    )  # fmt: skip


def arguments_of(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_key_by_key(name):
    """On the meta device: every key and shape of the original, the config of `pipelines/`, shards of 2 GB."""
    config = published_config(name)
    derived = rq_transformer_script.rq_transformer_config(config)
    component = rq_transformer_script.rq_transformer_component(derived)
    shapes = {key: tuple(shape) for key, shape in component.original_shapes().items()}
    del shapes[rq_transformer_script.RQVAE_CODEBOOK]
    assert shapes == original.rq_transformer_shapes(config)

    saved = RQTransformerModel.load_config(ROOT / "pipelines" / name / "transformer")
    assert arguments_of(component.model.config) == arguments_of(saved)
    index = json.loads((ROOT / "pipelines" / name / "model_index.json").read_text())
    settings = convert_archive.sampler_settings(config, derived["codebook_size"])
    assert settings == {key: index[key] for key in settings}

    shards = component.shards(torch.float32, conversion.MAX_SHARD_SIZE)
    assert sorted(key for keys in shards.filename_to_tensors.values() for key in keys) == sorted(component.shapes)
    for keys in shards.filename_to_tensors.values():
        assert sum(4 * component.shapes[key].numel() for key in keys) <= 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rqvaes_key_by_key(name):
    attention = [16] if "ffhq" in name else [8]
    ddconfig = original.IMAGENET_AUTOENCODER | {"attn_resolutions": attention}
    config = original.rqvae_config(ddconfig, n_embed=PUBLISHED[name][4], code_depth=4)
    component = rqvae_script.rqvae_component(rqvae_script.rqvae_config(config))
    assert {key: tuple(shape) for key, shape in component.original_shapes().items()} == original.rqvae_shapes(config)
    saved = RQVAEModel.load_config(ROOT / "pipelines" / name / "vae")
    assert arguments_of(component.model.config) == arguments_of(saved)


# ---- VQGAN ----


def test_vqgan_computes_what_the_original_does(tmp_path, capsys):
    config = original.vqgan_config()
    state_dict = original.random_weights(original.vqgan_shapes(config))
    checkpoint = write_stage(tmp_path / "vqgan", config, state_dict)
    vqgan_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "vae")])
    assert "loss.discriminator.main.0.weight" in capsys.readouterr().out

    vae = RQVAEModel.from_pretrained(tmp_path / "vae").eval()
    assert (vae.config.code_depth, vae.config.codebook_size) == (1, 48)
    ddconfig, weights = config["model"]["params"]["ddconfig"], original.doubles(state_dict)
    pixels = random_pixels(size=16).double()
    latents = original.encode(weights, ddconfig, pixels)
    codes, quantized = original.quantize([weights["quantize.embedding.weight"]], latents)
    with torch.no_grad():
        encoded = vae.double().encode(pixels)
        torch.testing.assert_close(encoded.latents, latents, **EXACT)
        assert torch.equal(encoded.codes, codes)
        sample = original.decode(weights, ddconfig, quantized)
        torch.testing.assert_close(vae.decode(codes).sample, sample, **EXACT)

    # the codebook goes on from where it is when training goes on
    before = vae.float().quantizer.codebook.clone()
    update = vae.update_codebook(latents.float())
    assert int(update.num_restarted) == 0
    used = codes.unique()
    unused = [k for k in range(48) if k not in used]
    torch.testing.assert_close(vae.quantizer.codebook[0, unused], before[0, unused])

    arguments = ["--checkpoint_path", str(tmp_path / "vae"), "--output_dir", str(tmp_path / "back"), "--to_original"]
    vqgan_script.main(arguments)
    kept = {key: value for key, value in state_dict.items() if not key.startswith("loss.")}
    same_state_dicts(read(tmp_path / "back" / "model.ckpt"), kept)


def test_vqgan_transformer_computes_what_the_original_does(tmp_path):
    config = original.net2net_config(original.vqgan_config())
    state_dict = original.random_net2net(config)
    checkpoint = write_stage(tmp_path / "cin", config, state_dict)
    vqgan_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "pipeline")])

    pipe = RQTransformerPipeline.from_pretrained(tmp_path / "pipeline")
    codes, labels = random_codes(pipe.transformer), torch.tensor([0, 4])
    weights = {
        key.removeprefix("transformer."): value
        for key, value in original.doubles(state_dict).items()
        if key.startswith("transformer.")
    }
    logits = original.gpt_logits(weights, 4, codes.flatten(1), labels)
    with torch.no_grad():
        output = pipe.transformer.double()(labels=codes, class_labels=labels)
    torch.testing.assert_close(output.logits.squeeze(2), logits, **EXACT)
    pipe.transformer.float()
    pipe.set_progress_bar_config(disable=True)
    image = pipe(class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert image.shape == (1, 3, 16, 16)

    arguments = ["--checkpoint_path", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "back")]
    vqgan_script.main([*arguments, "--to_original"])
    kept = {key: value for key, value in state_dict.items() if ".loss." not in key}
    same_state_dicts(read(tmp_path / "back" / "model.ckpt"), kept)


def test_vqgan_transformer_trained_on_apart_is_refused_on_the_way_back(tmp_path):
    config = original.net2net_config(original.vqgan_config())
    checkpoint = write_stage(tmp_path / "cin", config, original.random_net2net(config))
    vqgan_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "pipeline")])
    transformer = RQTransformerModel.from_pretrained(tmp_path / "pipeline" / "transformer")
    with torch.no_grad():
        transformer.condition_embedding.weight.add_(1)
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    with pytest.raises(ValueError, match="one table for classes and codes"):
        vqgan_script.restore_vqgan(tmp_path / "pipeline")


@pytest.mark.parametrize("n_embed", [1024, 16384])
def test_published_vqgans_key_by_key(n_embed):
    config = original.vqgan_config(original.VQGAN_AUTOENCODER, n_embed=n_embed)
    component = vqgan_script.vqgan_component(vqgan_script.vqgan_config(config["model"]))
    expected = {key: shape for key, shape in original.vqgan_shapes(config).items() if not key.startswith("loss.")}
    assert {key: tuple(shape) for key, shape in component.original_shapes().items()} == expected
    assert component.model.spatial_scale_factor == 16

    config = original.net2net_config(config, num_classes=1000, embed_dim=1536, layers=48, heads=24)
    component = vqgan_script.gpt_component(vqgan_script.gpt_config(config["model"]))
    shapes = {key: tuple(shape) for key, shape in component.original_shapes().items()}
    del shapes[vqgan_script.VQGAN_CODEBOOK]
    expected = {key: shape for key, shape in original.gpt_shapes(config).items() if not key.endswith("mask")}
    assert shapes == expected
