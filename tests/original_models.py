"""The original models as far as a conversion must know them: configs, keys, shapes and the computation.

Written from the facts of the published checkpoints and papers: no code of the original repositories. Weights are
random. The computations run in the dtype of what they are given.
"""

import math

import torch
import torch.nn.functional as F


# ---- RQ-VAE and VQGAN ----


def autoencoder_settings(**changes) -> dict:
    """`ddconfig` of a small network with attention in the middle level: 16, 8 and 4 pixels."""
    small = dict(
        double_z=False, z_channels=32, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2],
        num_res_blocks=2, attn_resolutions=[8], dropout=0.0,
    )  # fmt: skip
    return small | changes


IMAGENET_AUTOENCODER = dict(
    double_z=False, z_channels=256, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 1, 2, 2, 4, 4],
    num_res_blocks=2, attn_resolutions=[8], dropout=0.0,
)  # fmt: skip
VQGAN_AUTOENCODER = IMAGENET_AUTOENCODER | dict(ch_mult=[1, 1, 2, 2, 4], attn_resolutions=[16])


def rqvae_config(ddconfig: dict | None = None, n_embed=48, code_depth=3, shared_codebook=True) -> dict:
    """A `stage1/config.yaml`, with settings of the training that conversion does not need."""
    ddconfig = ddconfig or autoencoder_settings()
    size = ddconfig["resolution"] // 2 ** (len(ddconfig["ch_mult"]) - 1)
    return {
        "dataset": {"type": "imagenet", "transforms": {"type": "imagenet256x256"}},
        "arch": {
            "type": "rq-vae",
            "code_hier": 1,
            "hparams": {
                "bottleneck_type": "rq",
                "embed_dim": ddconfig["z_channels"],
                "n_embed": n_embed,
                "latent_shape": [size, size, ddconfig["z_channels"]],
                "code_shape": [size, size, code_depth],
                "shared_codebook": shared_codebook,
                "decay": 0.99,
                "restart_unused_codes": True,
                "loss_type": "mse",
                "latent_loss_weight": 0.25,
            },
            "ddconfig": ddconfig,
            "checkpointing": True,
        },
        "optimizer": {"type": "adam", "init_lr": 4.0e-5},
    }


def _conv(name, inputs, outputs, size):
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def _norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _residual_block(name, inputs, outputs):
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs, 3)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs, 3)
    return shapes | (_conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def _attention(name, channels):
    shapes = _norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.{part}", channels, channels, 1)
    return shapes


def _middle(name, channels):
    return (
        _residual_block(f"{name}.block_1", channels, channels)
        | _attention(f"{name}.attn_1", channels)
        | _residual_block(f"{name}.block_2", channels, channels)
    )


def autoencoder_shapes(ddconfig: dict) -> dict[str, tuple]:
    """Keys and shapes of encoder, decoder and the two convolutions at the code."""
    channels = [ddconfig["ch"] * multiplier for multiplier in ddconfig["ch_mult"]]
    levels, latent = len(channels), ddconfig["z_channels"]
    attended = [ddconfig["resolution"] // 2**i in ddconfig["attn_resolutions"] for i in range(levels)]

    shapes = _conv("encoder.conv_in", ddconfig["in_channels"], ddconfig["ch"], 3)
    width = ddconfig["ch"]
    for i in range(levels):
        for j in range(ddconfig["num_res_blocks"]):
            shapes |= _residual_block(f"encoder.down.{i}.block.{j}", width, channels[i])
            width = channels[i]
            shapes |= _attention(f"encoder.down.{i}.attn.{j}", width) if attended[i] else {}
        if i < levels - 1:
            shapes |= _conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    shapes |= _middle("encoder.mid", width) | _norm("encoder.norm_out", width)
    shapes |= _conv("encoder.conv_out", width, latent, 3)

    shapes |= _conv("decoder.conv_in", latent, width, 3) | _middle("decoder.mid", width)
    for i in reversed(range(levels)):
        for j in range(ddconfig["num_res_blocks"] + 1):
            shapes |= _residual_block(f"decoder.up.{i}.block.{j}", width, channels[i])
            width = channels[i]
            shapes |= _attention(f"decoder.up.{i}.attn.{j}", width) if attended[i] else {}
        if i > 0:
            shapes |= _conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    shapes |= _norm("decoder.norm_out", width) | _conv("decoder.conv_out", width, ddconfig["out_ch"], 3)
    return shapes | _conv("quant_conv", latent, latent, 1) | _conv("post_quant_conv", latent, latent, 1)


def rqvae_shapes(config: dict) -> dict[str, tuple]:
    """Keys and shapes of an RQ-VAE's checkpoint."""
    hparams = config["arch"]["hparams"]
    shapes = autoencoder_shapes(config["arch"]["ddconfig"])
    for depth in range(hparams["code_shape"][2]):
        name = f"quantizer.codebooks.{depth}"
        shapes[f"{name}.weight"] = (hparams["n_embed"] + 1, hparams["embed_dim"])
        shapes[f"{name}.cluster_size_ema"] = (hparams["n_embed"],)
        shapes[f"{name}.embed_ema"] = (hparams["n_embed"], hparams["embed_dim"])
    return shapes


def random_weights(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 weights under which no activation explodes or vanishes, and no part is the identity."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if "codebook" in key or "quantize" in key:
            weights[key] = 0.5 * value
        elif len(shape) == 1:
            weights[key] = 0.1 * value + (".weight" in key)  # a norm's weight, or a bias
        elif "emb" in key:
            weights[key] = 0.3 * value
        else:
            weights[key] = value / math.prod(shape[1:]) ** 0.5
    return weights


def random_rqvae(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint's state dict; of a shared codebook it has one tensor under all keys."""
    state_dict = random_weights(rqvae_shapes(config), seed)
    for depth in range(config["arch"]["hparams"]["code_shape"][2]):
        name = f"quantizer.codebooks.{depth}"
        state_dict[f"{name}.weight"][-1] = 0
        state_dict[f"{name}.cluster_size_ema"].abs_()
        if config["arch"]["hparams"]["shared_codebook"]:
            for part in ("weight", "cluster_size_ema", "embed_ema"):
                state_dict[f"{name}.{part}"] = state_dict[f"quantizer.codebooks.0.{part}"]
    return state_dict


def doubles(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights in float64."""
    return {key: value.double() for key, value in state_dict.items()}


def _apply_conv(weights, name, x, **arguments):
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **arguments)


def _apply_norm(weights, name, x):
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _swish(x):
    return x * torch.sigmoid(x)


def _apply_residual_block(weights, name, x):
    h = _apply_conv(weights, f"{name}.conv1", _swish(_apply_norm(weights, f"{name}.norm1", x)), padding=1)
    h = _apply_conv(weights, f"{name}.conv2", _swish(_apply_norm(weights, f"{name}.norm2", h)), padding=1)
    if f"{name}.nin_shortcut.weight" in weights:
        x = _apply_conv(weights, f"{name}.nin_shortcut", x)
    return x + h


def _apply_attention(weights, name, x):
    h = _apply_norm(weights, f"{name}.norm", x)
    q, k, v = (_apply_conv(weights, f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, hw)
    scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
    h = torch.einsum("bij,bcj->bci", scores.softmax(dim=-1), v).view_as(x)
    return x + _apply_conv(weights, f"{name}.proj_out", h)


def _apply_blocks(weights, name, x):
    j = 0
    while f"{name}.block.{j}.conv1.weight" in weights:
        x = _apply_residual_block(weights, f"{name}.block.{j}", x)
        if f"{name}.attn.{j}.q.weight" in weights:
            x = _apply_attention(weights, f"{name}.attn.{j}", x)
        j += 1
    return x


def _apply_middle(weights, name, x):
    x = _apply_residual_block(weights, f"{name}.block_1", x)
    return _apply_residual_block(weights, f"{name}.block_2", _apply_attention(weights, f"{name}.attn_1", x))


def encode(weights, ddconfig, pixels):
    """Pixels `(B, 3, H, W)` -> latents `(B, C, h, w)`, before quantization."""
    x = _apply_conv(weights, "encoder.conv_in", pixels, padding=1)
    for i in range(len(ddconfig["ch_mult"])):
        x = _apply_blocks(weights, f"encoder.down.{i}", x)
        if f"encoder.down.{i}.downsample.conv.weight" in weights:
            # one row and column of zeros, below and on the right
            x = _apply_conv(weights, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = _swish(_apply_norm(weights, "encoder.norm_out", _apply_middle(weights, "encoder.mid", x)))
    return _apply_conv(weights, "quant_conv", _apply_conv(weights, "encoder.conv_out", x, padding=1))


def decode(weights, ddconfig, quantized):
    """Quantized latents `(B, C, h, w)` -> pixels `(B, 3, H, W)`."""
    x = _apply_conv(weights, "decoder.conv_in", _apply_conv(weights, "post_quant_conv", quantized), padding=1)
    x = _apply_middle(weights, "decoder.mid", x)
    for i in reversed(range(len(ddconfig["ch_mult"]))):
        x = _apply_blocks(weights, f"decoder.up.{i}", x)
        if f"decoder.up.{i}.upsample.conv.weight" in weights:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _apply_conv(weights, f"decoder.up.{i}.upsample.conv", x, padding=1)
    return _apply_conv(weights, "decoder.conv_out", _swish(_apply_norm(weights, "decoder.norm_out", x)), padding=1)


def quantize(books, latents):
    """Latents `(B, C, h, w)` -> codes `(B, h, w, D)` and quantized `(B, C, h, w)`; one codebook `(K, C)` a depth."""
    residual = latents.permute(0, 2, 3, 1)
    codes, quantized = [], torch.zeros_like(residual)
    for book in books:
        distances = torch.cdist(residual, book, compute_mode="donot_use_mm_for_euclid_dist")  # (B, h, w, K)
        codes.append(distances.argmin(dim=-1))
        residual, quantized = residual - book[codes[-1]], quantized + book[codes[-1]]
    return torch.stack(codes, dim=-1), quantized.permute(0, 3, 1, 2)


def rqvae_books(state_dict, code_depth):
    """The codebook of each depth, `(K, C)`: without the padding row."""
    return [state_dict[f"quantizer.codebooks.{depth}.weight"][:-1] for depth in range(code_depth)]


# ---- RQ-Transformer ----


def rq_transformer_config(
    embed_dim=32, heads=4, body=3, head=2, block_size=(4, 4, 3), vocab_size=48, input_embed_dim=32,
    vocab_size_cond=1, block_size_cond=1, sampling=None, data="imagenet",
) -> dict:  # fmt: skip
    """A `stage2/config.yaml`, with settings of the training that conversion does not need."""
    return {
        "dataset": {
            "type": data,
            "vocab_size": vocab_size,
            "context_length": block_size_cond,
            "txt_tok_name": "bpe16k_huggingface",
        },
        "arch": {
            "type": "rq-transformer",
            "block_size": list(block_size),
            "embed_dim": embed_dim,
            "input_embed_dim": input_embed_dim,
            "shared_tok_emb": True,
            "shared_cls_emb": True,
            "input_emb_vqvae": True,
            "head_emb_vqvae": True,
            "cumsum_depth_ctx": True,
            "vocab_size": vocab_size,
            "vocab_size_cond": vocab_size_cond,
            "block_size_cond": block_size_cond,
            "body": {"n_layer": body, "block": {"n_head": heads}},
            "head": {"n_layer": head, "block": {"n_head": heads}},
        },
        "loss": {"type": "soft_target_cross_entropy", "txt_weight": 0.1, "img_weight": 0.9},
        "sampling": sampling or {"temp": 1.0, "top_k": 16384, "top_p": 0.92},
    }


def _linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _transformer_block(name, dim):
    shapes = _norm(f"{name}.ln1", dim) | _norm(f"{name}.ln2", dim)
    for part in ("key", "query", "value", "proj"):
        shapes |= _linear(f"{name}.attn.{part}", dim, dim)
    return shapes | _linear(f"{name}.mlp.0", dim, 4 * dim) | _linear(f"{name}.mlp.2", 4 * dim, dim)


def rq_transformer_shapes(config: dict) -> dict[str, tuple]:
    """Keys and shapes of an RQ-Transformer's checkpoint."""
    arch = config["arch"]
    dim, (height, width, depth) = arch["embed_dim"], arch["block_size"]
    shapes = {
        "cond_emb.weight": (max(arch["vocab_size_cond"], 1), dim),
        "pos_emb_cond": (1, max(arch["block_size_cond"], 1), dim),
        "pos_emb_hw": (1, height * width, dim),
        "pos_emb_d": (1, depth, dim),
    }
    shapes |= _linear("input_mlp", arch["input_embed_dim"], dim) | _linear("head_mlp", arch["input_embed_dim"], dim)
    for stack in ("body", "head"):
        for i in range(arch[stack]["n_layer"]):
            shapes |= _transformer_block(f"{stack}_transformer.blocks.{i}", dim)
    shapes |= _norm("classifier.layer_norm", dim) | _linear("classifier.linear", dim, arch["vocab_size"])
    if arch["block_size_cond"] > 1:
        shapes |= _norm("cond_classifier.layer_norm", dim)
        shapes |= _linear("cond_classifier.linear", dim, arch["vocab_size_cond"])
    return shapes


def _apply_linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _apply_layer_norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _apply_transformer(weights, name, heads, x):
    """Causal pre-LN blocks over `(B, L, d)`."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    i = 0
    while f"{name}.{i}.ln1.weight" in weights:
        block = f"{name}.{i}"
        h = _apply_layer_norm(weights, f"{block}.ln1", x)
        q, k, v = (
            _apply_linear(weights, f"{block}.attn.{part}", h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )  # (B, H, L, d/H)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        x = x + _apply_linear(weights, f"{block}.attn.proj", (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        h = _apply_linear(weights, f"{block}.mlp.0", _apply_layer_norm(weights, f"{block}.ln2", x))
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + _apply_linear(weights, f"{block}.mlp.2", h)
        i += 1
    return x


def rq_transformer_logits(weights, config, books, codes, condition):
    """Logits `(B, N, D, K)` of codes `(B, h, w, D)`, and of the text `(B, P - 1, V)` or `None`.

    `condition` is `(B, P)`; `books` are the codebooks of the RQ-VAE, one a depth.
    """
    arch = config["arch"]
    heads, stacks = arch["body"]["block"]["n_head"], codes.flatten(1, 2)  # (B, N, D)
    vectors = torch.stack([book[stacks[..., d]] for d, book in enumerate(books)], dim=2)  # (B, N, D, C)
    # spatial: each vector is projected, then summed over depth; everything moves on by the condition's length
    image = _apply_linear(weights, "input_mlp", vectors).sum(dim=2) + weights["pos_emb_hw"]
    prefix = weights["cond_emb.weight"][condition] + weights["pos_emb_cond"]
    hidden = torch.cat([prefix, image[:, :-1]], dim=1)
    hidden = _apply_transformer(weights, "body_transformer.blocks", heads, hidden)
    length = prefix.shape[1]
    context = hidden[:, length - 1 :]  # (B, N, d)
    # depth: the context itself, then the projected sums of the vectors so far
    sums = _apply_linear(weights, "head_mlp", vectors.cumsum(dim=2)[:, :, :-1])
    depth = torch.cat([context.unsqueeze(2), sums], dim=2) + weights["pos_emb_d"]
    depth = _apply_transformer(weights, "head_transformer.blocks", heads, depth.flatten(0, 1))
    logits = _apply_linear(weights, "classifier.linear", _apply_layer_norm(weights, "classifier.layer_norm", depth))
    logits = logits.unflatten(0, stacks.shape[:2])
    if length == 1:
        return logits, None
    text = _apply_layer_norm(weights, "cond_classifier.layer_norm", hidden[:, : length - 1])
    return logits, _apply_linear(weights, "cond_classifier.linear", text)


# ---- VQGAN and its transformer ----


def vqgan_config(ddconfig: dict | None = None, n_embed=48) -> dict:
    """A VQGAN's `model.yaml`."""
    ddconfig = ddconfig or autoencoder_settings()
    return {
        "model": {
            "base_learning_rate": 4.5e-06,
            "target": "taming.models.vqgan.VQModel",
            "params": {
                "embed_dim": ddconfig["z_channels"],
                "n_embed": n_embed,
                "ddconfig": ddconfig,
                "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"},
            },
        }
    }


def vqgan_shapes(config: dict) -> dict[str, tuple]:
    """Keys and shapes of a VQGAN's checkpoint, with a part of what only training uses."""
    params = config["model"]["params"]
    shapes = autoencoder_shapes(params["ddconfig"])
    shapes["quantize.embedding.weight"] = (params["n_embed"], params["embed_dim"])
    return shapes | _conv("loss.discriminator.main.0", 3, 8, 4)


def net2net_config(vqgan: dict, num_classes=5, embed_dim=32, layers=2, heads=4) -> dict:
    """The config of a VQGAN's class-conditional transformer."""
    params = vqgan["model"]["params"]
    size = params["ddconfig"]["resolution"] // 2 ** (len(params["ddconfig"]["ch_mult"]) - 1)
    return {
        "model": {
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": {
                "cond_stage_key": "class_label",
                "transformer_config": {
                    "target": "taming.modules.transformer.mingpt.GPT",
                    "params": {
                        "vocab_size": params["n_embed"],
                        "block_size": size * size,
                        "n_layer": layers,
                        "n_head": heads,
                        "n_embd": embed_dim,
                    },
                },
                "first_stage_config": vqgan["model"],
                "cond_stage_config": {
                    "target": "taming.modules.util.Labelator",
                    "params": {"n_classes": num_classes},
                },
            },
        }
    }


def gpt_shapes(config: dict) -> dict[str, tuple]:
    """Keys and shapes of the transformer alone, without its prefix in the checkpoint."""
    gpt = config["model"]["params"]["transformer_config"]["params"]
    dim, length = gpt["n_embd"], gpt["block_size"]
    shapes = {"tok_emb.weight": (gpt["vocab_size"], dim), "pos_emb": (1, length, dim)}
    for i in range(gpt["n_layer"]):
        shapes |= _transformer_block(f"blocks.{i}", dim) | {f"blocks.{i}.attn.mask": (1, 1, length, length)}
    return shapes | _norm("ln_f", dim) | _linear("head", dim, gpt["vocab_size"], bias=False)


def random_net2net(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a VQGAN with its transformer."""
    vqgan = random_weights(vqgan_shapes({"model": config["model"]["params"]["first_stage_config"]}), seed)
    gpt = random_weights(gpt_shapes(config), seed + 1)
    for key, value in gpt.items():
        if key.endswith("mask"):
            gpt[key] = torch.ones_like(value).tril()
    return {f"first_stage_model.{key}": value for key, value in vqgan.items()} | {
        f"transformer.{key}": value for key, value in gpt.items()
    }


def gpt_logits(weights, heads, codes, labels):
    """Logits `(B, N, K)` of codes `(B, N)` given classes `(B,)`, which are tokens of the same table as the codes."""
    tokens = torch.cat([labels[:, None], codes[:, :-1]], dim=1)
    hidden = weights["tok_emb.weight"][tokens] + weights["pos_emb"]
    hidden = _apply_transformer(weights, "blocks", heads, hidden)
    return _apply_linear(weights, "head", _apply_layer_norm(weights, "ln_f", hidden))
