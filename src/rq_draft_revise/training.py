"""Training: the beginning of a run, and for the second stage its components, the optimisation loop and the export."""

import inspect
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from torchvision.utils import save_image
from tqdm.auto import tqdm

from .batches import Batch
from .budget import Budget, learning_rate_at
from .checkpoints import checkpoints_in, load_checkpoint, save_checkpoint
from .contextual_rq_transformer import ContextualRQTransformerModel
from .data import SkippedRows
from .divergence import NonFiniteGuard
from .images import check_same_codebook
from .interruption import StopSignal
from .masks import Draws, draws_of_step
from .model_card import model_card
from .pipeline_draft_and_revise import DraftAndRevisePipeline
from .pipeline_rq_transformer import RQTransformerPipeline
from .publishing import create_repository
from .rq_transformer import RQTransformerModel
from .rqvae import RQVAEModel
from .scheduling_draft_and_revise import DraftAndReviseScheduler
from .splits import BatchSource
from .training_log import LogWindow, TrainingLog
from .validation import ValidationSet, sample_images, validation_loss


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# What `--model` may be.
MODELS = {"contextual": ContextualRQTransformerModel, "autoregressive": RQTransformerModel}


# ------------------------------------------------------------------------------------------------- the run's beginning


def make_accelerator(args) -> Accelerator:
    """The run's accelerator, from `mixed_precision`, `gradient_accumulation_steps`, `report_to`, `output_dir`, `seed`.

    The global random state is seeded the same in every process, so that all start from the same weights.

    Raises:
        `ValueError`: what accelerate would pass over in silence: float16 on a CPU, a tracker that is not installed.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        # The only buffers are the codebook, which the second stage never changes, and its statistics, which
        # update_codebook keeps equal by itself. Sending them from process 0 before every forward would cost 16 MB a
        # step and hide a divergence.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        raise ValueError("--mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16': that needs a GPU.")
    if args.report_to not in (None, "all") and not accelerator.log_with:
        raise ValueError(f"--report_to must name a tracker that is installed, got {args.report_to!r}.")
    set_seed(args.seed)
    return accelerator


def open_output(args, accelerator: Accelerator) -> str | None:
    """Make the folder `output_dir` and, to be pushed to, the repository, whose id the main process gets.

    Raises:
        `ValueError`: there is a run in it, which this one neither resumes nor may overwrite.
    """
    if not accelerator.is_main_process:
        return None
    output_dir = Path(args.output_dir)
    is_resumed = args.resume_from_checkpoint is not None
    before = [] if is_resumed else checkpoints_in(output_dir)
    is_run = before or (output_dir / "train_log.jsonl").exists()
    if is_run and not is_resumed and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir must not hold another run, got {output_dir}. --resume_from_checkpoint latest goes on with "
            "it, --overwrite_output_dir begins anew and deletes its checkpoints."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    repo_id = create_repository(args)
    args.hub_model_id = repo_id or args.hub_model_id  # which the card names
    for folder in before:  # only now: the repository might have been refused
        shutil.rmtree(folder)
    return repo_id


def run_length(args, accelerator: Accelerator, num_images: int | None) -> tuple[int, int]:
    """Images of an optimizer step, of all processes and micro-batches together, and the optimizer steps of the run.

    Raises:
        `ValueError`: neither `max_train_steps` nor the number of images is known.
    """
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if args.max_train_steps is not None:
        return total_batch_size, args.max_train_steps
    if num_images is None:
        raise ValueError("--max_train_steps must be given where the number of images is not known: a stream.")
    return total_batch_size, math.ceil(args.num_train_epochs * num_images / total_batch_size)


def load_progress(
    args, accelerator: Accelerator, data: dict[str, Any] | None = None
) -> tuple[dict[str, Any], tuple[int, int]]:
    """How far the run is, from `resume_from_checkpoint` if that names or finds one, and this process's place in a
    stream. Restores everything that is prepared or registered.

    Args:
        data (`dict`, *optional*): What must be as it was, see [`load_checkpoint`].
    """
    progress = {"step": 0, "images": 0, "epoch": 0, "seconds": 0.0, "skipped_steps": 0, "places": None, "window": None}
    if args.resume_from_checkpoint is not None:
        loaded = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint, vars(args), data)
        progress |= loaded or {}
    places = progress["places"]
    return progress, (0, 0) if places is None else tuple(places[accelerator.process_index])


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


class AveragedWeights(EMAModel):
    """Exponential moving average of weights that may be sharded: a checkpoint holds them whole.

    With the warm-up the decay is min(decay, 1 - (1 + step)^(-2/3)): 0.9999 is only reached after a million steps, and
    a short run exports more than its initialisation.
    """

    def __init__(self, parameters, decay: float):
        parameters = list(parameters)
        self.is_sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)
        # Copying many sharded tensors at once is not implemented in torch.
        super().__init__(parameters, decay=decay, use_ema_warmup=True, power=2 / 3, foreach=not self.is_sharded)

    def store(self, parameters) -> None:
        """As of the base class, which moves the weights to the CPU; shards stay where their mesh is."""
        if self.is_sharded:
            self.temp_stored_params = [parameter.detach().clone() for parameter in parameters]
        else:
            super().store(parameters)

    def state_dict(self) -> dict:
        """As of the base class; every process has to call it."""
        state = super().state_dict()
        state["shadow_params"] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.shadow_params]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """As of the base class, on the devices where the weights are now; each process keeps its shards."""
        present = self.shadow_params
        super().load_state_dict(state_dict)
        # accelerate reads checkpoints into the memory of the CPU
        self.shadow_params = [loaded.to(before.device) for loaded, before in zip(self.shadow_params, present)]
        if self.is_sharded:
            from torch.distributed.tensor import distribute_tensor

            self.shadow_params = [
                distribute_tensor(whole, shard.device_mesh, shard.placements)
                if hasattr(shard, "full_tensor")
                else whole
                for whole, shard in zip(self.shadow_params, present)
            ]


# -------------------------------------------------------------------------------------------------------------- loop


def train(
    args,
    accelerator: Accelerator,
    pipeline: "DiffusionPipeline",
    condition_name: str | None,
    batches_from: BatchSource,
    num_images: int | None,
    validation_sets: dict[str, ValidationSet],
    sample_condition: dict[str, list],
    skipped: SkippedRows,
) -> bool:
    """Train `pipeline.transformer` on codes and export the pipeline to `args.output_dir`.

    The loss is the mean negative log-likelihood of the codes at masked positions (of all codes for the autoregressive
    model), with text 0.9 of it and 0.1 of that of the next text token (`text_loss_weight`). All means are over the
    global batch, however it is split into processes and micro-batches.

    Args:
        args: The flags of [`add_training_flags`]; they say what each is.
        pipeline: With the transformer as initialised, equal in all processes, and the frozen RQ-VAE.
        condition_name (`str`, *optional*): `"class_labels"` or `"input_ids"`, the transformer's argument.
        batches_from: Where this process's endless micro-batches come from.
        num_images (`int`, *optional*): Training images, if known.
        validation_sets: By name.
        sample_condition: The pipeline's argument for the sample grid, see [`sample_images`].
        skipped: Rows that the batches leave out.

    Returns:
        Whether the run came to its end; False after a signal, with a checkpoint and without an export.
    """
    transformer = pipeline.transformer
    config, output_dir = transformer.config, Path(args.output_dir)
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
        transformer.parameters(),
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
    parameters = list(model.parameters())
    ema = None
    if args.ema_decay > 0:
        ema = AveragedWeights(parameters, args.ema_decay)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    # From here on each process has a stream of its own, for the residual dropout. Masks, dropped conditions and the
    # order of the images come from generators seeded by (seed, step) or (seed, epoch), whatever the processes.
    set_seed(args.seed, device_specific=True)

    # 2. Length of the run
    total_batch_size, max_train_steps = run_length(args, accelerator, num_images)
    data = {"num_images": num_images, "max_train_steps": max_train_steps, "data_digest": batches_from.digest}
    progress, place = load_progress(args, accelerator, data)
    step, images_seen = progress["step"], progress["images"]
    log = TrainingLog(accelerator, output_dir, step)
    accelerator.print(
        f"parameters: {sum(p.numel() for p in transformer.parameters()):,}\n"
        f"images: {'unknown number of' if num_images is None else f'{num_images:,}'} training"
        + "".join(f", {len(codes):,} {name}" for name, (codes, _) in validation_sets.items())
        + f"; skipped rows: {skipped}\n"
        f"codes: {config.height}x{config.width}x{config.code_depth} of {config.codebook_size:,}\n"
        f"total batch: {total_batch_size:,} = {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} micro-batches (published models: 2,048)\n"
        f"steps: {max_train_steps:,}"
        + (f" ({max_train_steps * total_batch_size / num_images:.1f} epochs)" if num_images else "")
        + (f" or {args.max_train_seconds:,.0f} seconds" if args.max_train_seconds else "")
        + f", from step {step:,}",
    )

    # 3. What is done now and then
    budget = Budget(accelerator, max_train_steps, args.max_train_seconds, progress["seconds"])

    def entry_of(kind: str) -> dict[str, Any]:
        return {"kind": kind, "step": step, "images": images_seen, "seconds": round(budget.elapsed(), 2)}

    def validate():
        """The losses, and a grid of samples, of the weights that would be exported."""
        transformer.eval()
        if ema is not None:
            ema.store(parameters)
            ema.copy_to(parameters)
        for name, validation_set in validation_sets.items():
            losses = validation_loss(transformer, condition_name, validation_set, args.train_batch_size, accelerator)
            log.write(
                {**entry_of("validation"), "split": name, **losses},
                f"  validation at step {step} on {name}: {losses_line(losses)}",
            )
        if args.num_validation_images:
            images = sample_images(pipeline, sample_condition, args.num_validation_images, accelerator)
            if accelerator.is_main_process:
                path = output_dir / f"samples-{step:07d}.png"
                save_image(images, path, nrow=math.ceil(len(images) ** 0.5), padding=0)
                log.write_image("samples", path, step)
        reshard(model)
        if ema is not None:
            ema.restore(parameters)
        transformer.train()

    def checkpoint():
        epoch = images_seen // num_images if num_images else place[0]
        places = None if batch.place is None else gathered(place, accelerator)
        progress = {"step": step, "images": images_seen, "epoch": epoch, "seconds": budget.elapsed(),
                    "skipped_steps": guard.num_skipped, "places": places, "window": window.state()}  # fmt: skip
        save_checkpoint(accelerator, output_dir, progress, vars(args), args.checkpoints_total_limit, data)

    # 4. Training
    guard = NonFiniteGuard(accelerator, args.max_nonfinite_steps)
    guard.num_skipped = progress["skipped_steps"]
    # A batch comes in so many parts. Their gradients are averaged: accelerate divides each loss by the number of
    # micro-batches, and DistributedDataParallel the gradients by the number of processes.
    num_parts = accelerator.num_processes * args.gradient_accumulation_steps
    batches = batches_from(images_seen, place)
    window = LogWindow(accelerator, progress["window"])
    bar = tqdm(total=max_train_steps, initial=step, unit="step", disable=None if accelerator.is_main_process else True,
               bar_format="{desc}{n_fmt}/{total_fmt} steps {postfix}")  # fmt: skip
    interrupted = False
    with StopSignal(accelerator) as stop:
        while (fraction := budget.fraction_used(step)) < 1:
            learning_rate = learning_rate_at(
                step, fraction, args.learning_rate, args.lr_scheduler, args.lr_warmup_steps
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            draws = draws_of_step(
                total_batch_size, num_positions, args.condition_dropout, args.seed, step, args.stratified_masks,
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
            place = batch.place or place

            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            if guard.accepts(losses["loss"], grad_norm):
                optimizer.step()
                if ema is not None:
                    ema.step(parameters)
                values = {**losses, "grad_norm": torch.as_tensor(grad_norm, device=accelerator.device)}
                window.add({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()})
            optimizer.zero_grad()
            step += 1
            images_seen += total_batch_size
            window.images += total_batch_size

            if step % args.logging_steps == 0:
                means, rate = window.means(), window.images / window.seconds()
                left = budget.time_left(step)
                bar.update(step - bar.n)
                bar.set_postfix_str(f"{rate:.1f} images/s, {left} left")
                entry = {**entry_of("train"), "images_per_second": round(rate, 2), "learning_rate": learning_rate,
                         "skipped_steps": guard.num_skipped, **means}  # fmt: skip
                log.write(
                    entry,
                    f"step {step}/{max_train_steps} images {images_seen:,} {rate:.1f}/s, {left} left, lr "
                    f"{learning_rate:.2e} {losses_line(means)}",
                )
                window.clear()

            with window.paused():  # images/s is the speed of training alone
                if step % args.validation_steps == 0:
                    validate()
                interrupted = stop.requested()
                if step % args.checkpointing_steps == 0 or interrupted:
                    checkpoint()
            if interrupted:
                break
    bar.close()
    batches.close()

    # 5. Export
    if interrupted:
        accelerator.print(f"Stopped by a signal at step {step:,}; --resume_from_checkpoint latest goes on from there.")
    else:
        if step % args.validation_steps != 0:
            validate()
        if step < args.lr_warmup_steps:
            accelerator.print(
                f"Warning: the run ended within its warm-up: it had {step:,} steps, and --lr_warmup_steps is "
                f"{args.lr_warmup_steps:,}."
            )
        training = (
            f"{step:,} steps of {total_batch_size:,} images ({images_seen:,} in all), AdamW, learning rate "
            f"{args.learning_rate:g} ({args.lr_scheduler}), weights averaged with decay {args.ema_decay:g}; "
            "`train_log.jsonl` has the curves."
        )
        prompt = next(iter(sample_condition.get("prompt", [])), None)
        export(accelerator, model, ema, pipeline, args, training, prompt)
        seconds = budget.elapsed()
        accelerator.print(
            f"Saved to {output_dir} after {step:,} steps, {images_seen:,} images, {seconds:,.0f} seconds; "
            f"skipped rows: {skipped}; skipped steps: {guard.num_skipped:,}."
        )
    log.close()
    accelerator.wait_for_everyone()
    return not interrupted


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


def gathered(place: tuple[int, int], accelerator: Accelerator) -> list[list[int]]:
    """The places of all processes."""
    return accelerator.gather(torch.tensor([place], device=accelerator.device)).tolist()


def export(
    accelerator: Accelerator,
    model: torch.nn.Module,
    ema: EMAModel | None,
    pipeline: "DiffusionPipeline",
    args,
    training: str,
    prompt: str | None = None,
) -> None:
    """Write the pipeline with whole weights, the averaged ones if there are, and its card. Every process calls it.

    Args:
        training (`str`), prompt (`str`, *optional*): For the card.
    """
    if ema is not None:
        ema.copy_to(model.parameters())
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
