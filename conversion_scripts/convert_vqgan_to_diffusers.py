"""A VQGAN of taming-transformers as an `RQVAEModel` with D = 1, or with its class-conditional transformer as an
`RQTransformerPipeline`, and back.

Which of the two a checkpoint is, its config says. A `VQModel` becomes one component's folder, a `Net2NetTransformer`,
whose checkpoint holds its VQGAN, the folder of a pipeline.

python conversion_scripts/convert_vqgan_to_diffusers.py --checkpoint_path checkpoints/last.ckpt \
    --config_path configs/model.yaml --output_dir vqgan
python conversion_scripts/convert_vqgan_to_diffusers.py --checkpoint_path vqgan --output_dir original --to_original
"""

import shutil
from pathlib import Path

import torch
from conversion import (
    DTYPES,
    MAX_SHARD_SIZE,
    Change,
    Component,
    argument_parser,
    component_config,
    config_beside,
    derive_config,
    load_checkpoint,
    load_folder,
    recorded_class,
    report,
    require,
    run,
    save_checkpoint,
    save_model_index,
    setting,
)
from convert_rq_transformer_to_diffusers import block_keys
from convert_rqvae_to_diffusers import AUTOENCODER_KEYS, autoencoder_config

from rq_draft_revise import RQTransformerModel, RQTransformerPipeline, RQVAEModel
from rq_draft_revise.whole_files import whole_folder


def _codebook(old, shapes):
    """The row of the mask is new. The averages are too: as if each code had been seen once, where it is."""
    (vectors,) = old
    padding = vectors.new_zeros(1, vectors.shape[1])
    return [torch.cat([vectors, padding])[None], vectors.new_ones(1, vectors.shape[0]), vectors[None].clone()]


def _tokens(old, shapes):
    """Codes and classes are rows of one table there, the classes being its first; here there are two tables."""
    (tokens,) = old
    return [tokens, tokens[: shapes[1][0]].clone()]


def _one_table(new, number):
    codes, classes = new
    if not codes.is_meta and not torch.equal(codes[: classes.shape[0]], classes):
        raise ValueError(
            "The original has one table for classes and codes, and here the two differ: what was trained on since "
            "cannot be written in its form."
        )
    return [codes]


def _positions(old, shapes):
    """The class stands at position 0. The last code is never read, so its position, here, is new and zero."""
    (positions,) = old
    unread = positions.new_zeros(1, positions.shape[2])
    return [positions[0, :1].clone(), torch.cat([positions[0, 1:], unread])]


def _head(old, shapes):
    return [old[0], old[0].new_zeros(shapes[1])]


def _without_bias(new, number):
    weight, bias = new
    if not bias.is_meta and bias.any():
        raise ValueError("The original's head has no bias, and here it is not zero: it cannot be written in its form.")
    return [weight]


VQGAN_KEYS = [
    *AUTOENCODER_KEYS,
    (
        "quantize.embedding.weight",
        ("quantizer.codebook", "quantizer.ema_counts", "quantizer.ema_sums"),
        Change(_codebook, lambda new, number: [new[0][0, :-1]]),
    ),
]

# Not a key of the checkpoint: the codebook as `RQVAEModel` has it.
VQGAN_CODEBOOK = "codebook of the VQGAN"

GPT_KEYS = [
    ("tok_emb.weight", ("code_embedding.weight", "condition_embedding.weight"), Change(_tokens, _one_table)),
    (
        "pos_emb",
        ("prefix_position_embedding", "position_embedding"),
        Change(_positions, lambda new, number: [torch.cat([new[0], new[1][:-1]])[None]]),
    ),
    *block_keys("blocks", "blocks"),
    ("ln_f.{p}", "depth_transformer.norm_out.{p}"),
    (
        "head.weight",
        ("depth_transformer.head.weight", "depth_transformer.head.bias"),
        Change(_head, _without_bias),
    ),
    (VQGAN_CODEBOOK, "depth_transformer.codebook.vectors"),
]

VQGAN_DROPPED = {"loss.*": "discriminator and LPIPS, which only training uses"}
GPT_DROPPED = {"blocks.*.attn.mask": "constant: attention is causal"}

# The prefixes of the two models in a `Net2NetTransformer`.
FIRST_STAGE, GPT = "first_stage_model.", "transformer."


def vqgan_config(model: dict) -> dict:
    """Arguments of `RQVAEModel` from `target` and `params` of a `VQModel`."""
    require(model, target="taming.models.vqgan.VQModel")
    require(model, params__remap=None, params__colorize_nlabels=None, default=None)
    embed_dim = setting(model, "params.embed_dim")
    return autoencoder_config(setting(model, "params.ddconfig"), embed_dim) | dict(
        codebook_size=setting(model, "params.n_embed"), code_depth=1, shared_codebook=True
    )


def gpt_config(model: dict) -> dict:
    """Arguments of `RQTransformerModel` from `target` and `params` of a `Net2NetTransformer`."""
    require(
        model,
        params__cond_stage_config__target="taming.modules.util.Labelator",
        params__transformer_config__target="taming.modules.transformer.mingpt.GPT",
    )
    identity = "taming.modules.transformer.permuter.Identity"
    require(model, params__permuter_config__target=identity, default=identity)
    require(model, params__unconditional=False, default=False)
    gpt = setting(model, "params.transformer_config.params")
    require(gpt, n_unmasked=0, default=0)
    vqgan = vqgan_config(setting(model, "params.first_stage_config"))
    size = vqgan["sample_size"] // 2 ** (len(vqgan["block_out_channels"]) - 1)
    require(gpt, vocab_size=vqgan["codebook_size"], block_size=size * size)
    num_classes = setting(model, "params.cond_stage_config.params.n_classes")
    heads, dim = setting(gpt, "n_head"), setting(gpt, "n_embd")
    if num_classes > vqgan["codebook_size"] or dim % heads:
        raise ValueError(
            f"`n_classes` must be at most `vocab_size`, and `n_embd` a multiple of `n_head`, got {num_classes}, "
            f"{vqgan['codebook_size']}, {dim} and {heads}."
        )
    return dict(
        height=size,
        width=size,
        code_depth=1,
        codebook_size=vqgan["codebook_size"],
        codebook_dim=vqgan["latent_channels"],
        num_spatial_layers=setting(gpt, "n_layer"),
        num_depth_layers=0,
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        dropout=setting(gpt, "resid_pdrop", 0.0),
        num_classes=num_classes,
        learned_code_embedding=True,
    )


def vqgan_component(config: dict) -> Component:
    """The VQGAN of these arguments, linked to the original's keys."""
    counts = {"u": len(config["block_out_channels"])}
    return Component(RQVAEModel, config, VQGAN_KEYS, counts, VQGAN_DROPPED)


def gpt_component(config: dict) -> Component:
    """The transformer of these arguments, linked to the original's keys."""
    return Component(RQTransformerModel, config, GPT_KEYS, {}, GPT_DROPPED)


def _part(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The keys under a prefix, without it; they are taken out of the state dict."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    return {key.removeprefix(prefix): state_dict.pop(key) for key in keys}


def convert_vqgan(
    checkpoint_path: Path,
    config_path: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write the `RQVAEModel` of a VQGAN, or the pipeline of a VQGAN with its transformer, into `folder`."""
    state_dict, left_out = load_checkpoint(checkpoint_path)
    model = derive_config(lambda config: setting(config, "model"), config_path)
    if setting(model, "target") != "taming.models.cond_transformer.Net2NetTransformer":
        component = vqgan_component(derive_config(lambda config: vqgan_config(config["model"]), config_path))
        left_out |= component.check(state_dict)
        component.save(state_dict, folder, dtype, max_shard_size)
        report(component, folder, left_out)
        return

    gpt = gpt_component(derive_config(lambda config: gpt_config(config["model"]), config_path))
    vqgan = vqgan_component(vqgan_config(model["params"]["first_stage_config"]))
    first_stage, transformer = _part(state_dict, FIRST_STAGE), _part(state_dict, GPT)
    if state_dict:
        raise ValueError(f"The checkpoint must hold a VQGAN and its transformer alone, got {sorted(state_dict)[:5]}.")
    left_out |= vqgan.check(first_stage)
    transformer[VQGAN_CODEBOOK] = _codebook([first_stage["quantize.embedding.weight"]], [])[0]
    left_out |= gpt.check(transformer)
    for name, component, tensors in (("vae", vqgan, first_stage), ("transformer", gpt, transformer)):
        component.save(tensors, folder / name, dtype, max_shard_size)
        report(component, folder / name, left_out)
        left_out = {}
    save_model_index(
        folder,
        RQTransformerPipeline,
        {"vae": recorded_class(RQVAEModel), "transformer": recorded_class(RQTransformerModel), "tokenizer": None},
        {"id2label": None, "guidance_scale": 1.0, "temperature": 1.0, "top_k": None, "top_p": None},
    )


def restore_vqgan(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The original's state dict of the `RQVAEModel`, or of the pipeline, in `folder`.

    Without `loss.*`, which the converted model does not have.
    """
    pipeline = (folder / "model_index.json").is_file()
    vae = folder / "vae" if pipeline else folder
    first_stage = vqgan_component(component_config(RQVAEModel, vae)).restore(load_folder(vae), dtype)
    if not pipeline:
        return first_stage
    config = component_config(RQTransformerModel, folder / "transformer")
    transformer = gpt_component(config).restore(load_folder(folder / "transformer"), dtype)
    del transformer[VQGAN_CODEBOOK]
    length = config["height"] * config["width"]
    mask = torch.ones(length, length).tril()[None, None]
    transformer |= {f"blocks.{i}.attn.mask": mask for i in range(config["num_spatial_layers"])}
    return {FIRST_STAGE + key: value for key, value in first_stage.items()} | {
        GPT + key: value for key, value in transformer.items()
    }


def main(argv=None):
    args = argument_parser(__doc__).parse_args(argv)
    dtype = DTYPES[args.dtype]
    with whole_folder(args.output_dir) as folder:
        if args.to_original:
            save_checkpoint(restore_vqgan(Path(args.checkpoint_path), dtype), folder / "model.ckpt")
            if args.config_path:
                shutil.copy(args.config_path, folder / "config.yaml")
        else:
            convert_vqgan(Path(args.checkpoint_path), config_beside(args), folder, dtype)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
