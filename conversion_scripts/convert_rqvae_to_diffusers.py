"""An RQ-VAE of the authors (rq-vae-transformer, `stage1`) as an `RQVAEModel`, and back.

python conversion_scripts/convert_rqvae_to_diffusers.py --checkpoint_path stage1/model.pt --output_dir rqvae
python conversion_scripts/convert_rqvae_to_diffusers.py --checkpoint_path rqvae --output_dir original --to_original
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from conversion import (
    DTYPES,
    MAX_SHARD_SIZE,
    POINTWISE,
    Change,
    Component,
    argument_parser,
    component_config,
    config_beside,
    derive_config,
    load_checkpoint,
    load_folder,
    report,
    require,
    run,
    save_checkpoint,
    setting,
)

from rq_draft_revise import RQVAEModel
from rq_draft_revise.whole_files import whole_folder


# VQGAN's encoder and decoder <-> diffusers'. The original numbers the levels of both from high resolution to low
# (`{u}`), diffusers those of the decoder in the order of computation.
AUTOENCODER_KEYS = [
    ("{side}.conv_in.{p}", "{side}.conv_in.{p}"),
    ("encoder.down.{i}.block.{j}.{layer}.{p}", "encoder.down_blocks.{i}.resnets.{j}.{layer}.{p}"),
    ("encoder.down.{i}.block.{j}.nin_shortcut.{p}", "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.{p}"),
    ("encoder.down.{i}.attn.{j}.norm.{p}", "encoder.down_blocks.{i}.attentions.{j}.group_norm.{p}"),
    ("encoder.down.{i}.attn.{j}.q.weight", "encoder.down_blocks.{i}.attentions.{j}.to_q.weight", POINTWISE),
    ("encoder.down.{i}.attn.{j}.k.weight", "encoder.down_blocks.{i}.attentions.{j}.to_k.weight", POINTWISE),
    ("encoder.down.{i}.attn.{j}.v.weight", "encoder.down_blocks.{i}.attentions.{j}.to_v.weight", POINTWISE),
    ("encoder.down.{i}.attn.{j}.proj_out.weight", "encoder.down_blocks.{i}.attentions.{j}.to_out.0.weight", POINTWISE),
    ("encoder.down.{i}.attn.{j}.q.bias", "encoder.down_blocks.{i}.attentions.{j}.to_q.bias"),
    ("encoder.down.{i}.attn.{j}.k.bias", "encoder.down_blocks.{i}.attentions.{j}.to_k.bias"),
    ("encoder.down.{i}.attn.{j}.v.bias", "encoder.down_blocks.{i}.attentions.{j}.to_v.bias"),
    ("encoder.down.{i}.attn.{j}.proj_out.bias", "encoder.down_blocks.{i}.attentions.{j}.to_out.0.bias"),
    ("encoder.down.{i}.downsample.conv.{p}", "encoder.down_blocks.{i}.downsamplers.0.conv.{p}"),
    ("{side}.mid.block_1.{layer}.{p}", "{side}.mid_block.resnets.0.{layer}.{p}"),
    ("{side}.mid.attn_1.norm.{p}", "{side}.mid_block.attentions.0.group_norm.{p}"),
    ("{side}.mid.attn_1.q.weight", "{side}.mid_block.attentions.0.to_q.weight", POINTWISE),
    ("{side}.mid.attn_1.k.weight", "{side}.mid_block.attentions.0.to_k.weight", POINTWISE),
    ("{side}.mid.attn_1.v.weight", "{side}.mid_block.attentions.0.to_v.weight", POINTWISE),
    ("{side}.mid.attn_1.proj_out.weight", "{side}.mid_block.attentions.0.to_out.0.weight", POINTWISE),
    ("{side}.mid.attn_1.q.bias", "{side}.mid_block.attentions.0.to_q.bias"),
    ("{side}.mid.attn_1.k.bias", "{side}.mid_block.attentions.0.to_k.bias"),
    ("{side}.mid.attn_1.v.bias", "{side}.mid_block.attentions.0.to_v.bias"),
    ("{side}.mid.attn_1.proj_out.bias", "{side}.mid_block.attentions.0.to_out.0.bias"),
    ("{side}.mid.block_2.{layer}.{p}", "{side}.mid_block.resnets.1.{layer}.{p}"),
    ("decoder.up.{u}.block.{j}.{layer}.{p}", "decoder.up_blocks.{-u}.resnets.{j}.{layer}.{p}"),
    ("decoder.up.{u}.block.{j}.nin_shortcut.{p}", "decoder.up_blocks.{-u}.resnets.{j}.conv_shortcut.{p}"),
    ("decoder.up.{u}.attn.{j}.norm.{p}", "decoder.up_blocks.{-u}.attentions.{j}.group_norm.{p}"),
    ("decoder.up.{u}.attn.{j}.q.weight", "decoder.up_blocks.{-u}.attentions.{j}.to_q.weight", POINTWISE),
    ("decoder.up.{u}.attn.{j}.k.weight", "decoder.up_blocks.{-u}.attentions.{j}.to_k.weight", POINTWISE),
    ("decoder.up.{u}.attn.{j}.v.weight", "decoder.up_blocks.{-u}.attentions.{j}.to_v.weight", POINTWISE),
    ("decoder.up.{u}.attn.{j}.proj_out.weight", "decoder.up_blocks.{-u}.attentions.{j}.to_out.0.weight", POINTWISE),
    ("decoder.up.{u}.attn.{j}.q.bias", "decoder.up_blocks.{-u}.attentions.{j}.to_q.bias"),
    ("decoder.up.{u}.attn.{j}.k.bias", "decoder.up_blocks.{-u}.attentions.{j}.to_k.bias"),
    ("decoder.up.{u}.attn.{j}.v.bias", "decoder.up_blocks.{-u}.attentions.{j}.to_v.bias"),
    ("decoder.up.{u}.attn.{j}.proj_out.bias", "decoder.up_blocks.{-u}.attentions.{j}.to_out.0.bias"),
    ("decoder.up.{u}.upsample.conv.{p}", "decoder.up_blocks.{-u}.upsamplers.0.conv.{p}"),
    ("{side}.norm_out.{p}", "{side}.conv_norm_out.{p}"),
    ("{side}.conv_out.{p}", "{side}.conv_out.{p}"),
    ("quant_conv.{p}", "quant_conv.{p}"),
    ("post_quant_conv.{p}", "post_quant_conv.{p}"),
]


def _stack(books: list[torch.Tensor], shapes: list[torch.Size]) -> list[torch.Tensor]:
    """The codebooks of all depths as one tensor; of a shared one the checkpoint has equal copies, one a depth."""
    if shapes[0][0] > 1:
        return [torch.stack(books)]
    if not all(torch.equal(books[0], book) for book in books[1:]):
        raise ValueError("`arch.hparams.shared_codebook` is true, but the codebooks in the checkpoint are not equal.")
    return [books[0][None]]


def _stack_padded(books: list[torch.Tensor], shapes: list[torch.Size]) -> list[torch.Tensor]:
    """As `_stack`, with zeros in the last row, by which a masked position embeds as nothing."""
    (stacked,) = _stack(books, shapes)
    return [torch.cat([stacked[:, :-1], torch.zeros_like(stacked[:, -1:])], dim=1)]


def _unstack(new: list[torch.Tensor], depths: int) -> list[torch.Tensor]:
    books = new[0].unbind()
    return [books[min(depth, len(books) - 1)] for depth in range(depths)]


RQVAE_KEYS = [
    *AUTOENCODER_KEYS,
    ("quantizer.codebooks.{d}.weight", "quantizer.codebook", Change(_stack_padded, _unstack)),
    ("quantizer.codebooks.{d}.cluster_size_ema", "quantizer.ema_counts", Change(_stack, _unstack)),
    ("quantizer.codebooks.{d}.embed_ema", "quantizer.ema_sums", Change(_stack, _unstack)),
]


def autoencoder_config(ddconfig: dict, embed_dim: int) -> dict:
    """Arguments of `RQVAEModel` from the settings of the network that RQ-VAE and VQGAN have in common."""
    require(ddconfig, double_z=False, z_channels=embed_dim)
    require(ddconfig, resamp_with_conv=True, default=True)
    channels = [setting(ddconfig, "ch") * multiplier for multiplier in setting(ddconfig, "ch_mult")]
    resolutions = [setting(ddconfig, "resolution") // 2**level for level in range(len(channels))]
    attention = [resolution in setting(ddconfig, "attn_resolutions") for resolution in resolutions]
    return dict(
        in_channels=setting(ddconfig, "in_channels"),
        out_channels=setting(ddconfig, "out_ch"),
        block_out_channels=channels,
        down_block_types=["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        up_block_types=["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        layers_per_block=setting(ddconfig, "num_res_blocks"),
        latent_channels=embed_dim,
        sample_size=setting(ddconfig, "resolution"),
    )


def rqvae_config(original: dict) -> dict:
    """Arguments of `RQVAEModel` from a `stage1/config.yaml`."""
    require(original, arch__type="rq-vae", arch__hparams__bottleneck_type="rq")
    hparams = setting(original, "arch.hparams")
    code_shape = setting(hparams, "code_shape")
    if setting(hparams, "latent_shape") != [*code_shape[:2], setting(hparams, "embed_dim")]:
        raise ValueError(
            "`arch.hparams.latent_shape` must be that of `code_shape` with `embed_dim` channels: codes of patches of "
            f"latents have no counterpart here, got {hparams['latent_shape']} and {code_shape}."
        )
    sizes = setting(hparams, "n_embed")
    sizes = sizes if isinstance(sizes, list) else [sizes]
    decays = setting(hparams, "decay", 0.99)
    decays = decays if isinstance(decays, list) else [decays]
    if len(set(sizes)) != 1 or len(set(decays)) != 1:
        raise ValueError(f"`n_embed` and `decay` must be the same at all depths, got {sizes} and {decays}.")
    return autoencoder_config(setting(original, "arch.ddconfig"), setting(hparams, "embed_dim")) | dict(
        codebook_size=sizes[0],
        code_depth=code_shape[2],
        shared_codebook=setting(hparams, "shared_codebook"),
        commitment_weight=setting(hparams, "latent_loss_weight", 0.25),
        ema_decay=decays[0],
    )


def rqvae_component(config: dict) -> Component:
    """The RQ-VAE of these arguments, linked to the original's keys."""
    counts = {"u": len(config["block_out_channels"]), "d": config["code_depth"]}
    return Component(RQVAEModel, config, RQVAE_KEYS, counts)


def warn_of_padding(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Say so where the row of the mask is not zero. No code reads it, so it becomes zero here."""
    for key, value in state_dict.items():
        if key.startswith("quantizer.codebooks.") and key.endswith(".weight") and value[-1].any():
            print(f"Left out (no code reads the padding row, which is zero here): the last row of {key}")


def convert_rqvae(
    checkpoint_path: Path,
    config_path: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Component:
    """Write the `RQVAEModel` of a checkpoint into `folder`."""
    state_dict, left_out = load_checkpoint(checkpoint_path, ema)
    component = rqvae_component(derive_config(rqvae_config, config_path))
    left_out |= component.check(state_dict)
    warn_of_padding(state_dict)
    component.save(state_dict, folder, dtype, max_shard_size)
    report(component, folder, left_out)
    return component


def restore_rqvae(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The original's state dict of the `RQVAEModel` in `folder`."""
    return rqvae_component(component_config(RQVAEModel, folder)).restore(load_folder(folder), dtype)


def main(argv=None):
    parser = argument_parser(__doc__)
    parser.add_argument("--ema", action="store_true", help="The averaged weights, where the checkpoint has them.")
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    with whole_folder(args.output_dir) as folder:
        if args.to_original:
            name = "state_dict_ema" if args.ema else "state_dict"
            save_checkpoint(restore_rqvae(Path(args.checkpoint_path), dtype), folder / "model.pt", name)
            if args.config_path:
                shutil.copy(args.config_path, folder / "config.yaml")
        else:
            convert_rqvae(Path(args.checkpoint_path), config_beside(args), folder, dtype, args.ema)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
