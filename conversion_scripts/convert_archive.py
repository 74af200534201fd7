"""An archive that the authors of RQ-Transformer published, or its unpacked folder, as the folder of a pipeline.

python conversion_scripts/convert_archive.py imagenet_1.4B_rqvae_50e.tar.gz rq-imagenet-256-1.4b
python conversion_scripts/convert_archive.py cc3m.tar.gz rq-cc3m-256-654m --tokenizer_dir pretrained
"""

import argparse
import json
import shutil
import tarfile
import zlib
from pathlib import Path

from conversion import (
    DTYPES,
    MAX_SHARD_SIZE,
    derive_config,
    load_config,
    recorded_class,
    run,
    save_model_index,
    setting,
)
from convert_rq_tokenizer import convert_tokenizer, original_tokenizer, tokenizer_config
from convert_rq_transformer_to_diffusers import convert_rq_transformer, rq_transformer_config
from convert_rqvae_to_diffusers import convert_rqvae

from rq_draft_revise import RQTransformerModel, RQTransformerPipeline, RQVAEModel
from rq_draft_revise.whole_files import whole_folder


# Names of the archives -> the data that the transformer was trained on, and the FID its authors report.
PUBLISHED = {
    "ffhq": ("FFHQ", "10.38"),
    "church": ("LSUN church", "7.45"),
    "cat": ("LSUN cat", "8.64"),
    "bedroom": ("LSUN bedroom", "3.04"),
    "imagenet_480M": ("ImageNet", "15.72"),
    "imagenet_821M": ("ImageNet", "13.11"),
    "imagenet_1.4B": ("ImageNet", "11.56"),
    "imagenet_1.4B_rqvae_50e": ("ImageNet", "8.71"),
    "imagenet_3.8B_rqvae_50e": ("ImageNet", "7.55"),
    "cc3m": ("CC-3M", "12.33"),
    "cc3m_cc12m_yfcc": ("CC-3M, CC-12M and a part of YFCC", "16.9 (MS-COCO 2014 val)"),
}
# The names of ImageNet's classes are in the config folders of this repository.
IMAGENET_INDEX = Path(__file__).resolve().parents[1] / "pipelines" / "rq-imagenet-256-480m" / "model_index.json"

CARD = """---
license: cc-by-nc-sa-4.0
library_name: diffusers
pipeline_tag: {task}
tags:
- rq-transformer
- {task}
---

# {title}

An RQ-Transformer with its RQ-VAE (Lee et al., *Autoregressive Image Generation using Residual Quantization*, CVPR
2022), converted from the checkpoint that its authors published in `{source}`
(<https://github.com/kakaobrain/rq-vae-transformer>). The weights are theirs; no training was done here.

```python
from rq_draft_revise import RQTransformerPipeline

pipe = RQTransformerPipeline.from_pretrained("path/to/this/folder")
image = pipe({call}).images[0]
```

| | |
|---|---|
| trained on | {data} |
| FID, as its authors report it | {fid} |
| codes of an image | {codes}, codebook of {codebook_size} |
| transformer | {layers} blocks, width {width}, {parameters:,} parameters |
| condition | {condition} |
| saved sampler settings | temperature {temperature}, top_k {top_k}, top_p {top_p} |
| weights | {dtype} |

The figures of the table's second row were not measured with these files.

## Licence

The authors license their pretrained weights under CC BY-NC-SA 4.0 and state that **any commercial use of their
checkpoints is strictly prohibited**. That holds for the converted weights too.

## Limitations

The training data were not curated for this use, and the authors warn that some images may offend. The model has no
null condition, so there is no classifier-free guidance.

```bibtex
@inproceedings{{lee2022autoregressive,
  title={{Autoregressive Image Generation using Residual Quantization}},
  author={{Lee, Doyup and Kim, Chiheon and Kim, Saehoon and Cho, Minsu and Han, Wook-Shin}},
  booktitle={{CVPR}},
  year={{2022}}
}}
```
"""


def extract(archive: Path, folder: Path) -> None:
    """Unpack the checkpoints and configs of an archive into `folder`, in one pass.

    Every member must stay inside the folder and be a plain file or folder; nothing else is unpacked.

    Raises:
        `ValueError`: the archive is damaged, or has a path that would leave the folder, a link or a device.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("Unpacking needs a Python with extraction filters: 3.10.12, 3.11.4 or later.")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                tarfile.data_filter(member, str(folder))
                if not member.isfile() and not member.isdir():
                    raise ValueError(f"{archive} must hold files and folders alone, got {member.name!r}.")
                name = Path(member.name)
                if member.isfile() and name.suffix in (".pt", ".yaml") and not name.name.startswith("._"):
                    tar.extract(member, folder, filter="data")
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} must stay inside its folder: {error}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} must be a complete tar archive: {error}") from error


def find_stages(folder: Path) -> dict[str, Path]:
    """The checkpoints of an unpacked archive by the `arch.type` of the config beside each.

    Raises:
        `ValueError`: there is not exactly one `rq-vae` and one `rq-transformer`, each with its config.
    """
    found = {"rq-vae": [], "rq-transformer": []}
    checkpoints = sorted(folder.rglob("*.pt"))
    required = "The archive must hold one RQ-VAE and one RQ-Transformer, each a .pt with its config.yaml, got"
    for checkpoint in checkpoints:
        config_path = checkpoint.with_name("config.yaml")
        if not config_path.is_file():
            raise ValueError(f"{required} {checkpoint.relative_to(folder)} without one.")
        kind = setting(load_config(config_path), "arch.type")
        if kind not in found:
            raise ValueError(f"`arch.type` must be one of {', '.join(found)}, got {kind!r} beside {checkpoint.name}.")
        found[kind].append(checkpoint)
    if any(len(stages) != 1 for stages in found.values()):
        names = [str(path.relative_to(folder)) for path in checkpoints]
        raise ValueError(f"{required} {names}.")
    return {kind: stages[0] for kind, stages in found.items()}


def sampler_settings(original: dict, codebook_size: int) -> dict:
    """Temperature, top_k and top_p of a `stage2/config.yaml`; a setting that limits nothing becomes `None`."""
    saved = setting(original, "sampling", None) or setting(original, "experiment.sample", {})

    def limit(name, no_limit):
        value = saved.get(name)
        values = value if isinstance(value, list) else [value]
        if all(one is None or one >= no_limit for one in values):
            return None
        return values[0] if len(set(values)) == 1 else values

    return {
        "temperature": saved.get("temp", 1.0),
        "top_k": limit("top_k", codebook_size),
        "top_p": limit("top_p", 1.0),
    }


def class_names(original: dict, num_classes: int | None) -> dict | None:
    """The names of ImageNet's classes; `None` for other data."""
    imagenet = str(setting(original, "dataset.type", "")).lower() == "imagenet"
    if not imagenet or num_classes != 1000 or not IMAGENET_INDEX.is_file():
        return None
    return json.loads(IMAGENET_INDEX.read_text(encoding="utf-8"))["id2label"]


def model_card(source: str, model: RQTransformerModel, settings: dict, dtype: str) -> str:
    """README.md of the pipeline: what it is, where it comes from, how to use it, and its licence."""
    name = source.removesuffix(".tar.gz")
    data, fid = PUBLISHED.get(name, ("not recorded", "not recorded"))
    config = model.config
    condition, call, task = "none", "", "unconditional-image-generation"
    if config.text_vocab_size is not None:
        condition = f"a text of {config.max_text_length} tokens"
        call, task = '"a painting of a cat with sunglasses"', "text-to-image"
    elif config.num_classes is not None:
        condition, call = f"one of {config.num_classes} classes", "class_labels=[207]"
    return CARD.format(
        title=f"RQ-Transformer, {data if name in PUBLISHED else name}",
        source=source,
        task=task,
        call=call,
        data=data,
        fid=fid,
        codes=f"{config.height}×{config.width}×{config.code_depth}",
        codebook_size=config.codebook_size,
        layers=f"{config.num_spatial_layers} + {config.num_depth_layers}",
        width=config.num_attention_heads * config.attention_head_dim,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        condition=condition,
        dtype=dtype,
        **{name: settings[name] for name in ("temperature", "top_k", "top_p")},
    )


def convert_archive(
    archive: Path,
    output_dir: Path,
    tokenizer_dir: Path | None = None,
    dtype: str = "float32",
    ema: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write the pipeline of an archive, or of its unpacked folder, into `output_dir`."""
    if not archive.exists():
        raise ValueError(
            f"`archive` must be a .tar.gz or its unpacked folder, got {str(archive)!r}, which is neither."
        )
    with whole_folder(output_dir) as folder:
        unpacked = archive
        if archive.is_file():
            unpacked = folder / "unpacked"
            unpacked.mkdir()
            extract(archive, unpacked)
        stages = find_stages(unpacked)
        rqvae, transformer = stages["rq-vae"], stages["rq-transformer"]
        rqvae_path, config_path = (path.with_name("config.yaml") for path in (rqvae, transformer))

        config = derive_config(rq_transformer_config, config_path)
        texts = config["text_vocab_size"] is not None
        if texts:
            # before the hours of work that the weights may take
            tokenizer = derive_config(tokenizer_config, config_path)
            if tokenizer_dir is None:
                raise ValueError(
                    f"`tokenizer_dir` must be given for a text-conditional archive: the folder of "
                    f"{' and '.join(tokenizer['files'])}, which is rqvae/txtimg_datasets/tokenizers/pretrained in the "
                    "authors' repository."
                )
            original_tokenizer(tokenizer_dir, tokenizer["files"], tokenizer["length"])

        weights = dict(dtype=DTYPES[dtype], max_shard_size=max_shard_size)
        convert_rqvae(rqvae, rqvae_path, folder / "vae", **weights)
        component = convert_rq_transformer(transformer, config_path, folder / "transformer", rqvae, ema=ema, **weights)
        if texts:
            convert_tokenizer(tokenizer_dir, config_path, folder / "tokenizer")

        original = load_config(config_path)
        settings = sampler_settings(original, config["codebook_size"]) | {
            "guidance_scale": 1.0,
            "id2label": class_names(original, config["num_classes"]),
        }
        recorded = {
            "vae": recorded_class(RQVAEModel),
            "transformer": recorded_class(RQTransformerModel),
            # the name that transformers 4 and 5 both know
            "tokenizer": ("transformers", "PreTrainedTokenizerFast") if texts else None,
        }
        save_model_index(folder, RQTransformerPipeline, recorded, settings)
        card = model_card(archive.resolve().name, component.model, settings, dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder / "unpacked", ignore_errors=True)
    print(f"Wrote {output_dir}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="The .tar.gz, or the folder that it unpacks to.")
    parser.add_argument("output_dir", type=Path, help="Folder to write; must not exist or be empty.")
    parser.add_argument(
        "--tokenizer_dir", type=Path, help="Folder of vocabulary and merges, for text-conditional archives."
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Of the weights; the RQ-VAE's codebook keeps float32."
    )
    parser.add_argument("--ema", action="store_true", help="The transformer's averaged weights, where it has them.")
    args = parser.parse_args(argv)
    convert_archive(args.archive, args.output_dir, args.tokenizer_dir, args.dtype, args.ema)


if __name__ == "__main__":
    run(main)
