"""An RQ-Transformer of the authors (rq-vae-transformer, `stage2`) as an `RQTransformerModel`, and back.

The model here carries the codebook in which it reads codes. It is taken from the RQ-VAE of the same archive.

python conversion_scripts/convert_rq_transformer_to_diffusers.py --checkpoint_path stage2/model.pt \
    --output_dir transformer
python conversion_scripts/convert_rq_transformer_to_diffusers.py --checkpoint_path transformer --output_dir original \
    --to_original
"""

import shutil
from pathlib import Path

import torch
from conversion import (
    DTYPES,
    MAX_SHARD_SIZE,
    UNBATCHED,
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
from convert_rqvae_to_diffusers import rqvae_component, rqvae_config

from rq_draft_revise import RQTransformerModel, RQVAEModel
from rq_draft_revise.whole_files import whole_folder


# Not a key of the transformer's checkpoint: the codebook as `RQVAEModel` has it.
RQVAE_CODEBOOK = "codebook of the RQ-VAE"

# minGPT's blocks <-> ours; the VQ-GAN transformers have them too
BLOCK_KEYS = [
    ("{stack}.{i}.ln1.{p}", "{blocks}.{i}.norm1.{p}"),
    ("{stack}.{i}.attn.query.{p}", "{blocks}.{i}.attn.to_q.{p}"),
    ("{stack}.{i}.attn.key.{p}", "{blocks}.{i}.attn.to_k.{p}"),
    ("{stack}.{i}.attn.value.{p}", "{blocks}.{i}.attn.to_v.{p}"),
    ("{stack}.{i}.attn.proj.{p}", "{blocks}.{i}.attn.to_out.0.{p}"),
    ("{stack}.{i}.ln2.{p}", "{blocks}.{i}.norm2.{p}"),
    ("{stack}.{i}.mlp.0.{p}", "{blocks}.{i}.ff.net.0.proj.{p}"),
    ("{stack}.{i}.mlp.2.{p}", "{blocks}.{i}.ff.net.2.{p}"),
]


def block_keys(stack: str, blocks: str) -> list[tuple[str, str]]:
    """`BLOCK_KEYS` for one stack of blocks, under its names in the original and here."""
    return [(old.replace("{stack}", stack), new.replace("{blocks}", blocks)) for old, new in BLOCK_KEYS]


RQ_TRANSFORMER_KEYS = [
    ("cond_emb.weight", "condition_embedding.weight"),
    ("pos_emb_cond", "prefix_position_embedding", UNBATCHED),
    ("input_mlp.{p}", "input_projection.{p}"),
    ("pos_emb_hw", "position_embedding", UNBATCHED),
    *block_keys("body_transformer.blocks", "blocks"),
    ("head_mlp.{p}", "depth_transformer.input_projection.{p}"),
    ("pos_emb_d", "depth_transformer.position_embedding", UNBATCHED),
    *block_keys("head_transformer.blocks", "depth_transformer.blocks"),
    ("classifier.layer_norm.{p}", "depth_transformer.norm_out.{p}"),
    ("classifier.linear.{p}", "depth_transformer.head.{p}"),
    ("cond_classifier.layer_norm.{p}", "text_norm_out.{p}"),
    ("cond_classifier.linear.{p}", "text_head.{p}"),
    (RQVAE_CODEBOOK, "depth_transformer.codebook.vectors"),
]


def rq_transformer_config(original: dict) -> dict:
    """Arguments of `RQTransformerModel` from a `stage2/config.yaml`; `shared_codebook` is for the RQ-VAE to say."""
    require(
        original,
        arch__type="rq-transformer",
        arch__input_emb_vqvae=True,
        arch__head_emb_vqvae=True,
        arch__cumsum_depth_ctx=True,
        arch__shared_cls_emb=True,
    )
    arch = setting(original, "arch")
    if len(setting(arch, "block_size")) != 3:
        raise ValueError(f"`arch.block_size` must be height, width and depth, got {arch['block_size']}.")
    height, width, code_depth = arch["block_size"]
    sizes = setting(arch, "vocab_size", None) or setting(original, "dataset.vocab_size")
    sizes = sizes if isinstance(sizes, list) else [sizes]
    if len(set(sizes)) != 1:
        raise ValueError(f"`arch.vocab_size` must be the same at all depths, got {sizes}.")
    for stack in ("body", "head"):
        block = setting(arch, f"{stack}.block")
        require(block, attn_bias=True, mlp_bias=True, default=True)
        require(block, gelu="v1", default="v1")
        require(block, embed_dim=setting(arch, "embed_dim"), default=setting(arch, "embed_dim"))
    heads = setting(arch, "body.block.n_head")
    if setting(arch, "head.block.n_head") != heads or setting(arch, "embed_dim") % heads:
        raise ValueError(
            f"`n_head` must be the same in body and head and divide `embed_dim`, got {heads}, "
            f"{arch['head']['block']['n_head']} and {arch['embed_dim']}."
        )
    texts = setting(arch, "block_size_cond", 0) > 1
    conditions = setting(arch, "vocab_size_cond", 0)
    return dict(
        height=height,
        width=width,
        code_depth=code_depth,
        codebook_size=sizes[0],
        codebook_dim=setting(arch, "input_embed_dim"),
        num_spatial_layers=setting(arch, "body.n_layer"),
        num_depth_layers=setting(arch, "head.n_layer"),
        num_attention_heads=heads,
        attention_head_dim=setting(arch, "embed_dim") // heads,
        dropout=setting(arch, "body.block.resid_pdrop", 0.1),
        num_classes=conditions if conditions > 1 and not texts else None,
        text_vocab_size=conditions if texts else None,
        max_text_length=arch["block_size_cond"] if texts else 32,
        text_loss_weight=setting(original, "loss.txt_weight", 0.1),
    )


def rq_transformer_component(config: dict) -> Component:
    """The RQ-Transformer of these arguments, linked to the original's keys."""
    dropped = {"head_mlp.*": "with one code a position nothing reads it"} if config["code_depth"] == 1 else None
    return Component(RQTransformerModel, config, RQ_TRANSFORMER_KEYS, {}, dropped)


def rqvae_codebook(rqvae_path: Path) -> torch.Tensor:
    """The codebook `(num_codebooks, K + 1, dim)` of an RQ-VAE: its converted folder, or its checkpoint.

    Raises:
        `ValueError`: it is neither, it has no config beside it, or its weights are not complete.
    """
    if rqvae_path.is_dir():
        component_config(RQVAEModel, rqvae_path)
        weights = load_folder(rqvae_path)
        if "quantizer.codebook" not in weights:
            raise ValueError(
                f"`rqvae_path` must be an RQ-VAE's folder with complete weights, got {str(rqvae_path)!r}, without "
                "`quantizer.codebook`."
            )
        return weights["quantizer.codebook"]
    config_path = rqvae_path.with_name("config.yaml")
    for path in (rqvae_path, config_path):
        if not path.is_file():
            raise ValueError(
                "`rqvae_path` must be the RQ-VAE's converted folder, or its checkpoint with a config.yaml beside it, "
                "by default ../stage1/model.pt, seen from the transformer's checkpoint, "
                f"got {str(rqvae_path)!r}: there is no {path}."
            )
    state_dict, _ = load_checkpoint(rqvae_path)
    component = rqvae_component(derive_config(rqvae_config, config_path))
    component.check(state_dict)
    (link,) = (link for link in component.links if link.new == ("quantizer.codebook",))
    return link.change.to_new([state_dict[key] for key in link.old], [component.shapes["quantizer.codebook"]])[0]


def convert_rq_transformer(
    checkpoint_path: Path,
    config_path: Path,
    folder: Path,
    rqvae_path: Path,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Component:
    """Write the `RQTransformerModel` of a checkpoint into `folder`. `rqvae_path` is of [`rqvae_codebook`]."""
    state_dict, left_out = load_checkpoint(checkpoint_path, ema)
    config = derive_config(rq_transformer_config, config_path)
    state_dict[RQVAE_CODEBOOK] = codebook = rqvae_codebook(rqvae_path)
    component = rq_transformer_component(config | {"shared_codebook": codebook.shape[0] == 1})
    left_out |= component.check(state_dict)
    component.save(state_dict, folder, dtype, max_shard_size)
    report(component, folder, left_out)
    return component


def restore_rq_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The original's state dict of the `RQTransformerModel` in `folder`."""
    component = rq_transformer_component(component_config(RQTransformerModel, folder))
    state_dict = component.restore(load_folder(folder), dtype)
    del state_dict[RQVAE_CODEBOOK]
    return state_dict


def main(argv=None):
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--rqvae_path", help="The RQ-VAE's model.pt or its converted folder; by default ../stage1/model.pt."
    )
    parser.add_argument("--ema", action="store_true", help="The averaged weights, where the checkpoint has them.")
    args = parser.parse_args(argv)
    checkpoint, dtype = Path(args.checkpoint_path), DTYPES[args.dtype]
    with whole_folder(args.output_dir) as folder:
        if args.to_original:
            name = "state_dict_ema" if args.ema else "state_dict"
            save_checkpoint(restore_rq_transformer(checkpoint, dtype), folder / "model.pt", name)
            if args.config_path:
                shutil.copy(args.config_path, folder / "config.yaml")
        else:
            rqvae_path = Path(args.rqvae_path or checkpoint.resolve().parent.parent / "stage1" / "model.pt")
            convert_rq_transformer(checkpoint, config_beside(args), folder, rqvae_path, dtype, args.ema)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
