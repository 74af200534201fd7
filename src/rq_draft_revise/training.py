"""Training the second stage: its components, the optimisation loop and the export."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torchvision.utils import save_image

from .batches import Batch
from .budget import learning_rate_at
from .contextual_rq_transformer import ContextualRQTransformerModel
from .data import SkippedRows
from .images import check_same_codebook
from .masks import Draws, draws_of_step
from .model_card import model_card
from .pipeline_draft_and_revise import DraftAndRevisePipeline
from .pipeline_rq_transformer import RQTransformerPipeline
from .rq_transformer import RQTransformerModel
from .rqvae import RQVAEModel
from .scheduling_draft_and_revise import DraftAndReviseScheduler
from .splits import BatchSource
from .training_run import TrainingRun, averaged_weights, exported_weights
from .validation import ValidationSet, sample_images, validation_loss


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# What `--model` may be.
MODELS = {"contextual": ContextualRQTransformerModel, "autoregressive": RQTransformerModel}


# -------------------------------------------------------------------------------------------------------- components


def has_file(pipeline: str, subfolder: str, pattern: str) -> bool:
    """Whether a pipeline's component has such a file; a Hub id is taken to be a complete pipeline."""
    return not Path(pipeline).is_dir() or any((Path(pipeline) / subfolder).glob(pattern))


def default_pipeline(name: str) -> str:
    """`name`, the default of `--pretrained_model_name_or_path`.

    Raises:
        `ValueError`: it is not there, because the script does not run in a checkout of this repository.
    """
    if not Path(name).is_dir():
        raise ValueError(
            f"--pretrained_model_name_or_path must be given where its default, {name}, is not: it lies in a checkout "
            "of this repository, from whose root the script finds it."
        )
    return name


def is_trained(args) -> bool:
    """Whether the transformer is loaded with weights, and does not begin from scratch."""
    return args.transformer_config is None and has_file(
        args.pretrained_model_name_or_path, "transformer", "*.safetensors*"
    )


def load_vae(pipeline: str, vae: str | None) -> RQVAEModel:
    """The RQ-VAE from `vae`, by default the pipeline's.

    Raises:
        `ValueError`: it has no weights.
    """
    if vae is not None:
        return RQVAEModel.from_pretrained(vae)
    if has_file(pipeline, "vae", "*.safetensors"):
        return RQVAEModel.from_pretrained(pipeline, subfolder="vae")
    raise ValueError(
        f"--vae must name a trained RQ-VAE, because {pipeline}/vae has no weights. examples/train_rqvae.py trains one "
        f"(--vae_config {pipeline}/vae), conversion_scripts/ convert published ones."
    )


def load_transformer(model: str, pipeline: str, transformer_config: str | None):
    """The transformer of kind `model`: fresh from `transformer_config`, or the pipeline's, fresh if it has no weights.

    Raises:
        `ValueError`: the configuration is of the other kind.
    """
    kind = MODELS[model]
    subfolder = {} if transformer_config is not None else {"subfolder": "transformer"}
    config = kind.load_config(transformer_config or pipeline, **subfolder)
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise ValueError(
            f"--model {model} is a {kind.__name__}, but {transformer_config or f'{pipeline}/transformer'} is the "
            f"configuration of a {config['_class_name']}."
        )
    if transformer_config is None and has_file(pipeline, "transformer", "*.safetensors*"):
        return kind.from_pretrained(pipeline, **subfolder)
    return kind.from_config(config)


def load_models(args, accelerator: Accelerator):
    """The frozen RQ-VAE, on the device, and the transformer, with the codebook of that.

    Raises:
        `ValueError`: the transformer was trained on the codes of another RQ-VAE.
    """
    vae = load_vae(args.pretrained_model_name_or_path, args.vae)
    transformer = load_transformer(args.model, args.pretrained_model_name_or_path, args.transformer_config)
    if transformer.codebook.any():  # zeros before training
        try:
            check_same_codebook(vae, transformer)
        except ValueError as error:
            place = f"{args.pretrained_model_name_or_path}/transformer"
            raise ValueError(
                f"The transformer of {place} was trained on the codes of another RQ-VAE than {args.vae or 'its own'}. "
                f"`--transformer_config {place}` starts one like it from scratch."
            ) from error
    needed, there = (tuple(book.shape) for book in (transformer.codebook, vae.quantizer.codebook))
    if needed != there:
        raise ValueError(
            f"The transformer reads codes in a codebook of shape {needed}, and the RQ-VAE's has {there} (codebooks, "
            "codes and the mask, dimensions). --transformer_config must name one that fits: codebook_size, "
            "codebook_dim, shared_codebook."
        )
    vae.requires_grad_(False).eval().to(accelerator.device)
    transformer.set_codebook(vae.quantizer.codebook)
    return vae, transformer


def pipeline_config(args) -> dict[str, Any]:
    """What the flags' pipeline has in its model_index.json; empty if it has none."""
    source = args.pretrained_model_name_or_path
    kind = DraftAndRevisePipeline if args.model == "contextual" else RQTransformerPipeline
    return kind.load_config(source) if has_file(source, ".", "model_index.json") else {}


def load_pipeline(args, vae: RQVAEModel, transformer, **components) -> "DiffusionPipeline":
    """The pipeline to be trained; its scheduler or sampler settings from the flags' pipeline, if that has them.

    Args:
        components: The tokenizer, or the names of the classes.
    """
    if args.model == "autoregressive":
        settings = sampler_settings(pipeline_config(args))
        return RQTransformerPipeline(vae, transformer, **components, **settings)
    scheduler = DraftAndReviseScheduler()
    if has_file(args.pretrained_model_name_or_path, "scheduler", "*.json"):
        scheduler = DraftAndReviseScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    return DraftAndRevisePipeline(vae, transformer, scheduler, **components)


def sampler_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The defaults of sampling in the configuration of an [`RQTransformerPipeline`]."""
    return {name: config[name] for name in ("guidance_scale", "temperature", "top_k", "top_p") if name in config}


def check_resolution(args, vae: RQVAEModel, transformer=None) -> None:
    """Set the default of `--resolution`; refuse, with a `ValueError`, one that the RQ-VAE has no codes of, or whose
    code map is not the transformer's."""
    if args.resolution is None:
        args.resolution = vae.config.sample_size
    if transformer is None:
        if args.resolution < 1 or args.resolution % vae.spatial_scale_factor:
            raise ValueError(f"--resolution must be a multiple of {vae.spatial_scale_factor}, got {args.resolution}.")
        return
    config, scale = transformer.config, vae.spatial_scale_factor
    covered = (config.height * scale, config.width * scale)
    if covered != (args.resolution, args.resolution):
        raise ValueError(
            f"--resolution must be {covered[0]} for {config.height}x{config.width} codes of this RQ-VAE, "
            f"got {args.resolution}."
        )


def check_condition_dropout(args, transformer) -> None:
    """Set the default of `--condition_dropout`; refuse, with a `ValueError`, one that the transformer cannot have."""
    if args.condition_dropout is None:
        args.condition_dropout = 0.0 if transformer.null_condition_id is None else 0.1
    if args.condition_dropout > 0 and transformer.null_condition_id is None:
        raise ValueError(
            f"--condition_dropout must be 0 for a transformer without a null condition, got {args.condition_dropout}."
        )


def configure_deepspeed(args, accelerator: Accelerator) -> None:
    """What DeepSpeed has to know of the flags before the model is prepared. Half precision becomes autocast: weights,
    codebook and averages stay in float32, as everywhere else; DeepSpeed's own bf16 would round all three.

    Raises:
        `ValueError`: float16, for which DeepSpeed's autocast has no loss scaler.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision must be 'no' or 'bf16' with DeepSpeed, got 'fp16'.")
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    autocast = {"enabled": accelerator.mixed_precision == "bf16", "dtype": "bfloat16"}
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["gradient_clipping"] = args.max_grad_norm
    config["bf16"] = {"enabled": False}
    config["torch_autocast"] = autocast


# ------------------------------------------------------------------------------------------------------------ export


def export_pipeline(
    run: TrainingRun,
    pipeline: "DiffusionPipeline",
    model: torch.nn.Module,
    training: str,
    prompt: str | None = None,
) -> None:
    """Write the pipeline with whole weights and its card. Every process calls it.

    Args:
        model: `pipeline.transformer` as it trained, wrapped.
        training (`str`), prompt (`str`, *optional*): For the card.
    """
    args, accelerator = run.args, run.accelerator
    weights = accelerator.get_state_dict(model)  # gathers what is sharded
    if accelerator.is_main_process:
        kind = type(pipeline.transformer)
        with torch.device("meta"):
            transformer = kind.from_config(pipeline.transformer.config)
        transformer.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()}, assign=True)
        accepted = inspect.signature(type(pipeline).__init__).parameters
        settings = {name: value for name, value in pipeline.config.items() if name in accepted}
        components = {**settings, **pipeline.components, "vae": pipeline.vae.cpu(), "transformer": transformer.eval()}
        exported = type(pipeline)(**components)
        exported.save_pretrained(args.output_dir)
        source = args.dataset_name or args.train_data_dir or ", ".join(args.data_files)
        filtering = None
        if args.filter_column is not None:
            bounds = [bound for bound in (args.filter_min, args.filter_max) if bound is not None]
            filtering = f"only rows whose `{args.filter_column}` is within the bounds {bounds}."
        card = model_card(
            exported,
            args.hub_model_id or str(args.output_dir),
            data=f"`{source}`, split `{args.train_split}`.",
            data_filtering=filtering,
            training=training,
            prompt=prompt,
        )
        card.save(Path(args.output_dir) / "README.md")
    accelerator.wait_for_everyone()


# -------------------------------------------------------------------------------------------------------------- loop


def train(
    args,
    accelerator: Accelerator,
    project: str,
    pipeline: "DiffusionPipeline",
    condition_name: str | None,
    batches_from: BatchSource,
    num_images: int | None,
    validation_sets: dict[str, ValidationSet],
    sample_condition: dict[str, list],
    skipped: SkippedRows,
    export: Callable[[TrainingRun, "DiffusionPipeline", torch.nn.Module, str], None] = export_pipeline,
) -> bool:
    """Train `pipeline.transformer`, or what of it is not frozen, on codes and export it to `args.output_dir`.

    The loss is the mean negative log-likelihood of the codes at masked positions (of all codes for the autoregressive
    model), with text 0.9 of it and 0.1 of that of the next text token (`text_loss_weight`). All means are over the
    global batch, however it is split into processes and micro-batches.

    Args:
        args: The flags of [`add_optimization_flags`], [`add_codes_flags`] and [`add_output_flags`], which say what
            each is, and `num_validation_images`.
        project (`str`): The run's name in trackers.
        pipeline: With the transformer as initialised, equal in all processes, and the frozen RQ-VAE.
        condition_name (`str`, *optional*): `"class_labels"` or `"input_ids"`, the transformer's argument.
        batches_from: Where this process's endless micro-batches come from.
        num_images (`int`, *optional*): Training images, if known.
        validation_sets: By name.
        sample_condition: The pipeline's argument for the sample grid, see [`sample_images`].
        skipped: Rows that the batches leave out.
        export: Writes the result: see [`export_pipeline`].

    Returns:
        Whether the run came to its end; False after a signal, with a checkpoint and without an export.
    """
    transformer = pipeline.transformer
    config = transformer.config
    is_contextual = isinstance(transformer, ContextualRQTransformerModel)
    num_positions = config.height * config.width
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.attention_backend is not None:
        transformer.set_attention_backend(args.attention_backend)
    if args.compile:
        transformer.compile_repeated_blocks()

    # 1. Optimizer. `model` is what trains: wrapped for several processes, autocast.
    optimizer = torch.optim.AdamW(
        [parameter for parameter in transformer.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(args, accelerator)
    model, optimizer = accelerator.prepare(transformer.train(), optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed takes the step itself, in the last backward: so it has to leave out those that are not finite.
        optimizer.optimizer.check_grad_overflow = True
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = averaged_weights(args, accelerator, parameters)
    # From here on each process has a stream of its own, for the residual dropout. Masks, dropped conditions and the
    # order of the images come from generators seeded by (seed, step) or (seed, epoch), whatever the processes.
    set_seed(args.seed, device_specific=True)

    # 2. The run, which a checkpoint may have brought on its way
    run = TrainingRun(args, accelerator, project, num_images, batches_from.digest)
    validation_codes = {name: codes for name, (codes, _) in validation_sets.items()}
    accelerator.print(
        f"parameters: {sum(p.numel() for p in parameters):,}\n"
        f"{run.describe_images(validation_codes)}; skipped rows: {skipped}\n"
        f"codes: {config.height}x{config.width}x{config.code_depth} of {config.codebook_size:,}\n{run.describe()}"
    )

    def validate():
        """The losses, and a grid of samples, of the weights that would be exported."""
        transformer.eval()
        with exported_weights(ema, parameters):
            for name, validation_set in validation_sets.items():
                losses = validation_loss(
                    transformer, condition_name, validation_set, args.train_batch_size, accelerator
                )
                run.log.write(
                    {**run.entry("validation"), "split": name, **losses},
                    f"  validation at step {run.step} on {name}: {losses_line(losses)}",
                )
            if args.num_validation_images:
                images = sample_images(pipeline, sample_condition, args.num_validation_images, accelerator)
                if accelerator.is_main_process:
                    path = run.output_dir / f"samples-{run.step:07d}.png"
                    save_image(images, path, nrow=math.ceil(len(images) ** 0.5), padding=0)
                    run.log.write_image("samples", path, run.step)
            reshard(model)
        transformer.train()

    # 3. Training. A batch comes in so many parts. Their gradients are averaged: accelerate divides each loss by the
    # number of micro-batches, and DistributedDataParallel the gradients by the number of processes.
    num_parts = accelerator.num_processes * args.gradient_accumulation_steps
    batches = batches_from(run.images_seen, run.place or (0, 0))
    has_validation = validation_sets or args.num_validation_images
    for fraction in run.steps(
        parameters, validate if has_validation else None, lambda means: (means, losses_line(means))
    ):
        run.learning_rate = learning_rate_at(
            run.step, fraction, args.learning_rate, args.lr_scheduler, args.lr_warmup_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate
        draws = draws_of_step(
            run.total_batch_size, num_positions, args.condition_dropout, args.seed, run.step, args.stratified_masks,
            masked=is_contextual,
        )  # fmt: skip

        losses = defaultdict(float)
        for micro_batch in range(args.gradient_accumulation_steps):
            first = (micro_batch * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            batch, own = next(batches), draws.part(first, args.train_batch_size)
            with accelerator.accumulate(model):
                parts = losses_of(model, transformer, batch, condition_name, own, draws, num_parts)
                accelerator.backward(parts["loss"])
            for name, value in parts.items():
                losses[name] += value.detach() / args.gradient_accumulation_steps
        run.place = batch.place

        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        if run.accepts(losses["loss"], grad_norm):
            optimizer.step()
            if ema is not None:
                ema.step(parameters)
            run.measured({**losses, "grad_norm": torch.as_tensor(grad_norm, device=accelerator.device)})
        optimizer.zero_grad()
    batches.close()

    # 4. Export
    if run.is_finished:
        if run.step < args.lr_warmup_steps:
            accelerator.print(
                f"Warning: the run ended within its warm-up: it had {run.step:,} steps, and --lr_warmup_steps is "
                f"{args.lr_warmup_steps:,}."
            )
        averaged = f", weights averaged with decay {args.ema_decay:g}" if ema is not None else ""
        training = (
            f"{run.step:,} steps of {run.total_batch_size:,} images ({run.images_seen:,} in all), AdamW, learning "
            f"rate {args.learning_rate:g} ({args.lr_scheduler}){averaged}; `train_log.jsonl` has the curves."
        )
        if ema is not None:
            ema.copy_to(parameters)
        export(run, pipeline, model, training)
    run.close(skipped)
    return run.is_finished


def losses_of(
    model: torch.nn.Module,
    transformer: torch.nn.Module,
    batch: Batch,
    condition_name: str | None,
    own: Draws,
    whole: Draws,
    num_parts: int,
) -> dict[str, torch.Tensor]:
    """The losses of a micro-batch, as its share of those of the whole batch; `loss` is to be descended.

    Averaging the means of the parts as they are would favour the codes in parts that have few. (The counts are on the
    host: no waiting for the device.)

    Args:
        model: `transformer` as it trains, wrapped.
        own, whole ([`Draws`]): Of this micro-batch and of the batch.
        num_parts (`int`): Parts that a batch comes in, processes times micro-batches.

    Returns:
        `loss`, `image_loss` and, with text, `text_loss`; scalars. The logits are gone, which would stay through the
        backward as well, copied to float32 by accelerate.
    """
    inputs = {"labels": batch.codes}
    if isinstance(transformer, ContextualRQTransformerModel):
        mask = own.masks.to(batch.codes.device).view(*batch.codes.shape[:3], 1)
        inputs["codes"] = batch.codes.masked_fill(mask, transformer.mask_token_id)
    if condition_name is not None:
        inputs[condition_name] = batch.condition
        if own.dropped.any():
            dropped = own.dropped.to(batch.codes.device).view(-1, *[1] * (batch.condition.ndim - 1))
            inputs[condition_name] = batch.condition.masked_fill(dropped, transformer.null_condition_id)
    out = model(**inputs)
    loss = image_loss = out.image_loss * (own.masks.sum().item() / whole.masks.sum().item() * num_parts)
    if out.text_loss is None:
        return {"loss": loss, "image_loss": image_loss}
    num_texts = max(1, (~whole.dropped).sum().item())
    text_loss = out.text_loss * ((~own.dropped).sum().item() / num_texts * num_parts)
    weight = transformer.config.text_loss_weight
    loss = (1 - weight) * image_loss + weight * text_loss
    return {"loss": loss, "image_loss": image_loss, "text_loss": text_loss}


def reshard(model: torch.nn.Module) -> None:
    """Let go of the whole weights that FSDP2 gathered in a forward without a backward.

    Its outermost module keeps them until the next backward. So after a validation of the averaged weights the next
    training step would go through them, whatever has been written into the shards meanwhile.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def losses_line(losses: dict[str, Any]) -> str:
    """Losses for a person to read."""
    return " ".join(
        f"{name} " + (" ".join("-" if v is None else f"{v:.3f}" for v in value) if isinstance(value, list) else
                      f"{value:.4f}")
        for name, value in losses.items()
    )  # fmt: skip
