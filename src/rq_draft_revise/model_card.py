"""Model cards: what a pipeline or a model is, how it is used and what to beware of, as its repository's README.md.

What the weights cannot tell (data, licence, figures) comes from whoever trained them; where it does not come, the card
says so.
"""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


SOURCE_URL = "https://github.com/rq-draft-revise/rq_draft_revise"
PAPER = (
    "[*Draft-and-Revise: Effective Image Generation with Contextual RQ-Transformer*]"
    "(https://arxiv.org/abs/2206.04452) (Lee et al., NeurIPS 2022)"
)
PARENT = "[RQ-Transformer](https://arxiv.org/abs/2203.01941) (Lee et al., CVPR 2022)"
NOT_STATED = "Not stated by whoever published these weights."
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

CITATION = """\
```bibtex
@inproceedings{lee2022draft,
  title     = {Draft-and-Revise: Effective Image Generation with Contextual {RQ}-Transformer},
  author    = {Lee, Doyup and Kim, Chiheon and Kim, Saehoon and Cho, Minsu and Han, Wook-Shin},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}
```"""

RISKS = {
    "pipeline": """\
- **Bias.** The model shows the world as its training data did: who and what appears, in which role, how often, and
  beside which words. Guidance and revising draw images towards what is common in the data, which strengthens it.
- **Misuse.** Generated or edited images can be taken for real ones. Do not use them to deceive, to show people doing
  what they did not do, or where an error harms somebody. Say of an image that it was generated.
- **Training data.** A model may reproduce images it was trained on, among them private or protected ones.
- **No filter.** Neither prompts nor images are filtered when sampling. Whoever offers the model to others has to add
  what their use asks for.
- **Filtering before training** is the measure that reaches all of this: remove from the data what the model must not
  learn to draw, look at who is missing as well, and write down what was removed and how. Data collected from the web
  need it most, with their captions. (The training scripts drop rows by a score with `--filter_column`.)""",
    "vae": """\
- An RQ-VAE writes an image in few codes. What it has not seen in training, such as faces, writing or fine texture of
  another domain, it replaces by what it knows: a reconstruction is not evidence of what the original showed.
- A generator trained on its codes inherits what it can and cannot draw, and the bias of the data behind that.
- Data that such a generator must not learn from should be filtered out before this first stage already.""",
}
RISKS["transformer"] = RISKS["pipeline"]


def model_card(
    component,
    repo_id: str,
    card_data: ModelCardData | None = None,
    data: str | None = None,
    data_filtering: str | None = None,
    training: str | None = None,
    variant: str | None = None,
    base_model: str | None = None,
    prompt: str | None = None,
) -> ModelCard:
    """A filled-in card.

    Args:
        component: A pipeline or a model of this package.
        repo_id (`str`): The Hub repository, or a folder, that the usage snippet loads.
        card_data (`ModelCardData`, *optional*): What stands in the metadata: `license`, `datasets` (Hub ids),
            `eval_results` (a list of `huggingface_hub.EvalResult`, together with `model_name`), `language`, `tags`.
        data (`str`, *optional*): What the weights were trained on, in Markdown: source, number of images, licence.
        data_filtering (`str`, *optional*): What was left out of the data, and how.
        training (`str`, *optional*): The command and the length of the run.
        variant (`str`, *optional*): The weights' variant, such as `"fp16"`, where there are no others.
        base_model (`str`, *optional*): Of LoRA weights in `repo_id`: where the pipeline is that they belong to, which
            is `component`. The card is then the adapter's.
        prompt (`str`, *optional*): What the usage snippet of a text-conditional pipeline draws.

    Returns:
        `huggingface_hub.ModelCard`: `str(card)` is the README.md, `card.save(path)` writes it.
    """
    kind = component_kind(component)
    metadata = complete_metadata(component, card_data, base_model)
    if base_model is not None and Path(base_model).is_absolute():
        base_model = Path(base_model).name  # the rest of a path of this machine is of no use to others
    name = repo_id.rstrip("/").split("/")[-1]
    licence = metadata.license_name or metadata.license
    sections = [
        f"# {name}",
        _introduction(component, base_model),
        "## Usage",
        f"With [rq_draft_revise]({SOURCE_URL}) installed (`pip install git+{SOURCE_URL}`):",
        f"```python\n{usage(component, repo_id, variant, base_model, prompt)}\n```",
        "## Model" if base_model is None else "## Base model",
        _table(describe(component)),
        "## Data",
        data or ("Trained on " + _links(metadata.datasets) + "." if metadata.datasets else NOT_STATED),
        "## Training",
        training or NOT_STATED,
        "## Evaluation",
        _results(metadata.eval_results),
        "## Bias, risks and data filtering",
        RISKS[kind],
        f"Of the data of these weights: {data_filtering or NOT_STATED}",
        "## Licence",
        f"{licence}." if licence else NOT_STATED,
        "## Citation",
        CITATION,
    ]
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n")


def component_kind(component) -> str:
    """`"pipeline"`, `"vae"` or `"transformer"`."""
    if hasattr(component, "components"):
        return "pipeline"
    return "vae" if hasattr(component, "quantizer") else "transformer"


def complete_metadata(
    component, card_data: ModelCardData | None = None, base_model: str | None = None
) -> ModelCardData:
    """A copy of `card_data` with what the component itself tells: library, task, tags, the metrics of the results."""
    metadata = ModelCardData(**(card_data.to_dict() if card_data is not None else {}))
    # not diffusers: the Hub would advise a line by which it does not load
    metadata.library_name = metadata.library_name or "rq_draft_revise"
    own_tags = ["rq_draft_revise", "draft-and-revise", "rq-vae", "residual-quantization"]
    if component_kind(component) == "pipeline":
        config = component.transformer.config
        # the Hub has no task of its own for images of a class, and files them under this one
        task = "text-to-image" if config.text_vocab_size is not None else "unconditional-image-generation"
        metadata.pipeline_tag = metadata.pipeline_tag or task
        if config.num_classes is not None:
            own_tags.append("class-conditional-image-generation")
    if base_model is not None:
        if not Path(base_model).exists():  # the Hub refuses what is none of its repositories
            metadata.base_model = metadata.base_model or base_model
        own_tags.append("lora")
    metadata.tags = list(dict.fromkeys([*(metadata.tags or []), *own_tags]))
    if metadata.eval_results:
        metrics = [result.metric_type for result in metadata.eval_results]
        metadata.metrics = list(dict.fromkeys([*(metadata.metrics or []), *metrics]))
    return metadata


# ---------------------------------------------------------------------------------------------------------- the parts


def usage(
    component, repo_id: str, variant: str | None = None, base_model: str | None = None, prompt: str | None = None
) -> str:
    """Python that loads `repo_id` and makes something with it, and runs as it stands."""
    arguments = f'"{base_model or repo_id}"'
    if variant is not None:
        arguments += f', variant="{variant}"'
        if variant in DTYPES:
            arguments += f", dtype=torch.{DTYPES[variant]}"
    name = type(component).__name__
    load = f"{name}.from_pretrained({arguments})"
    lines = [*_imports(component, variant), ""]
    kind = component_kind(component)
    if kind == "vae":
        size = component.config.sample_size
        dtype = f", dtype=torch.{DTYPES[variant]}" if variant in DTYPES else ""
        lines += [
            f"vae = {load}",
            f"pixel_values = 2 * torch.rand(1, 3, {size}, {size}{dtype}) - 1  # your images, in [-1, 1]",
            "with torch.no_grad():",
            "    codes = vae.encode(pixel_values).codes  # (1, h, w, D)",
            "    reconstruction = vae.decode(codes).sample  # (1, 3, H, W), about in [-1, 1]",
        ]
        return "\n".join(lines)
    if kind == "transformer":
        lines += [
            "# the transformer alone; a pipeline puts it together with its RQ-VAE",
            f"transformer = {load}",
            "print(transformer.config)",
        ]
        return "\n".join(lines)
    condition = _example_condition(component.transformer.config, prompt)
    lines.append(f"pipe = {load}")
    if base_model is not None:
        lines.append(f'pipe.load_lora_weights("{repo_id}")')
    if "Inpaint" in name:
        factor, config = component.vae.spatial_scale_factor, component.transformer.config
        width, height = config.width * factor, config.height * factor
        lines += [
            f'image = Image.new("RGB", ({width}, {height}), "gray")  # yours',
            'mask = Image.new("L", image.size)',
            f"mask.paste(255, (0, {height // 2}, {width}, {height}))  # white is drawn anew: here the lower half",
        ]
        condition = ", ".join(part for part in ("image, mask", condition) if part)
    lines += [f"image = pipe({condition}).images[0]", 'image.save("sample.png")']
    return "\n".join(lines)


def _imports(component, variant: str | None) -> list[str]:
    name = type(component).__name__
    needs_torch = component_kind(component) == "vae" or variant in DTYPES
    lines = ["import torch"] if needs_torch else []
    if "Inpaint" in name:
        lines.append("from PIL import Image")
    return [*lines, f"from rq_draft_revise import {name}"]


def _example_condition(config, prompt: str | None) -> str:
    if config.text_vocab_size is not None:
        return json.dumps(prompt or "a volcano at dusk", ensure_ascii=False)
    return "class_labels=0" if config.num_classes is not None else ""


def describe(component) -> dict[str, str]:
    """What the configuration says, as rows of a table."""
    if component_kind(component) != "pipeline":
        return _describe_model(component)
    rows = _describe_model(component.vae) | _describe_model(component.transformer)
    scheduler = getattr(component, "scheduler", None)
    if scheduler is not None:
        c = scheduler.config
        rows["sampler's defaults"] = (
            f"{c.num_inference_steps} steps of the draft, {c.num_revisions} revisions of {c.num_revise_steps} steps; "
            f"guidance {c.draft_guidance_scale:g} and {c.guidance_scale:g}, temperature {c.draft_temperature:g} and "
            f"{c.temperature:g} in the draft and in the revisions; selection {c.selection}"
        )
    return rows


def _describe_model(model) -> dict[str, str]:
    # without those of adapters, which may be loaded at the moment
    sizes = [parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name]
    config, count = model.config, f"{sum(sizes):,} parameters"
    if component_kind(model) == "vae":
        size = config.sample_size
        side = size // model.spatial_scale_factor
        return {
            "images": f"{size}×{size} pixels",
            "codes": f"{side}×{side}×{config.code_depth}, a codebook of {config.codebook_size:,}",
            "RQ-VAE": count,
        }
    dim = config.num_attention_heads * config.attention_head_dim
    condition = "none"
    if config.text_vocab_size is not None:
        condition = f"text of up to {config.max_text_length} tokens"
    elif config.num_classes is not None:
        condition = f"one of {config.num_classes:,} classes"
    return {
        "codes": f"{config.height}×{config.width}×{config.code_depth}, a codebook of {config.codebook_size:,}",
        "transformer": f"{type(model).__name__}, width {dim}, {config.num_spatial_layers} spatial and "
        f"{config.num_depth_layers} depth blocks, {count}",
        "condition": condition,
    }


def _introduction(component, base_model: str | None) -> str:
    if base_model is not None:
        return (
            f"LoRA weights for the transformer of `{base_model}`, a {type(component).__name__}; not a whole model. "
            "Data, training and figures below are the adapter's."
        )
    kind, name = component_kind(component), type(component).__name__
    if kind == "vae":
        return (
            "An RQ-VAE: images to small maps of code stacks, coarse to fine, and back. It is the first stage of "
            f"{PAPER}, in the open implementation rq_draft_revise."
        )
    thing = "A pipeline" if kind == "pipeline" else "A transformer over codes of an RQ-VAE"
    if "RQTransformer" in name and "Contextual" not in name:
        return f"{thing} of the autoregressive {PARENT}, in the open implementation rq_draft_revise."
    return (
        f"{thing} in the method of {PAPER}: a draft fills an empty map of codes block by "
        "block, revisions then predict every block anew with all others in view. Made with the open implementation "
        "rq_draft_revise, not by the authors of the paper."
    )


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _links(datasets: str | list[str]) -> str:
    names = [datasets] if isinstance(datasets, str) else datasets
    return ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in names)


def _results(eval_results) -> str:
    if not eval_results:
        return NOT_STATED
    lines = ["| data | metric | value |", "|---|---|---|"]
    lines += [
        f"| {r.dataset_name}{f' ({r.dataset_split})' if r.dataset_split else ''} | {r.metric_name or r.metric_type} | "
        f"{r.metric_value} |"
        for r in eval_results
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ cards that are there


def only_variant(folder: str | Path) -> str | None:
    """The variant of all weights in a folder, `None` where some have none or there are several."""
    names = [path.name.removesuffix(".safetensors") for path in Path(folder).rglob("*.safetensors")]
    variants = {re.sub(r"-\d+-of-\d+$", "", name).partition(".")[2] for name in names}
    return (variants.pop() or None) if len(variants) == 1 else None


def copy_card(source: str | Path, folder: str | Path, repo_id: str, place: str | None = None) -> bool:
    """Copy the README.md of a pipeline's folder, rewritten to load `repo_id`, and the files it links to that `folder`
    does not have.

    Args:
        source (`str` or `Path`), folder (`str` or `Path`): From where to where.
        repo_id (`str`): What the card's code is to load, a Hub id or a folder.
        place (`str`, *optional*): What it loads now; the path of `source` by default.

    Returns:
        Whether there was a card.
    """
    source, folder = Path(source).resolve(), Path(folder)
    if not (source / "README.md").is_file():
        return False
    text = (source / "README.md").read_text(encoding="utf-8")
    for name in linked_files(text, source):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    (folder / "README.md").write_text(moved_card(text, place or source.as_posix(), repo_id), encoding="utf-8")
    return True


def moved_card(text: str, source: str, repo_id: str) -> str:
    """A card whose Python loads `repo_id` where it loaded the folder `source`, however much of its path it named."""

    def load(match: re.Match) -> str:
        named = match[2].rstrip("/")
        return (
            f"{match[1]}{repo_id}{match[3]}" if named and f"/{source.rstrip('/')}".endswith(f"/{named}") else match[0]
        )

    return re.sub(r"""(from_pretrained\(\s*["'])([^"']+)(["'])""", load, text)


def linked_files(text: str, folder: str | Path) -> list[str]:
    """Files of `folder` that a card links to, pictures among them, relative to it."""
    folder = Path(folder).resolve()
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    files = [(folder / target).resolve() for target in targets]
    inside = [path for path in files if path.is_file() and path.is_relative_to(folder)]
    return sorted({path.relative_to(folder).as_posix() for path in inside})
