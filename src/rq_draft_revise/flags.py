"""Command-line flags that the training scripts share, named as in diffusers' own training scripts."""

import argparse


class FlagHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag's help ends with its default; the script's description stays as it is written."""

    def _get_help_string(self, action):
        # Where there is no default, the help says what happens without the flag.
        return action.help if action.default is None else super()._get_help_string(action)


class StoreGiven(argparse.Action):
    """The usual action, which also notes in the namespace's `_given` that its flag was on the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace._given = {*getattr(namespace, "_given", ()), self.dest}


class SwitchGiven(argparse.BooleanOptionalAction):
    """`--switch` and `--no-switch`, noted as by [`StoreGiven`]."""

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, values, option_string)
        namespace._given = {*getattr(namespace, "_given", ()), self.dest}


def add_model_flags(
    parser: argparse.ArgumentParser, components: str, pipelines: dict[str, str], other_sizes: str
) -> argparse._ArgumentGroup:
    """What trains in the second stage.

    Args:
        components (`str`): Of a pipeline, for its help.
        pipelines (`dict[str, str]`): By `--model`, the pipeline that trains without a flag.
        other_sizes (`str`): Where the paper's other models are, for the help.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=tuple(pipelines),
        default="contextual",
        help="The paper's model, or its autoregressive baseline, RQ-Transformer.",
    )
    group.add_argument(
        "--pretrained_model_name_or_path",
        help=f"Pipeline with {components}, a folder or Hub id. The transformer starts from its weights, or fresh from "
        f"its config.json if there are none. Default: {pipelines['contextual']}, or {pipelines['autoregressive']} for "
        f"the baseline; {other_sizes}.",
    )
    group.add_argument("--vae", help="Folder or Hub id of the RQ-VAE. Default: the pipeline's, if it has weights.")
    group.add_argument("--transformer_config", help="A config.json or a folder with one: train that from scratch.")
    return group


def add_data_flags(
    parser: argparse.ArgumentParser, image_column: str, source: str, takes_codes: bool = True
) -> argparse._ArgumentGroup:
    """Where images come from; `source` says what is read without a source, `takes_codes` whether codes will do."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        help="Hub id, or a local folder that `datasets.load_dataset` reads: of parquet files, images or webdataset "
        "tars" + (", or one that encode_dataset.py wrote" if takes_codes else "") + f". Default: {source}.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of a data set that has several.")
    group.add_argument(
        "--train_data_dir", help="Folder of images: with a subfolder a class, or a metadata.jsonl of captions."
    )
    group.add_argument(
        "--data_files",
        nargs="+",
        help="Files of the training split (parquet, csv, json, tar), patterns and addresses too.",
    )
    group.add_argument("--train_split", default="train", help="Also a part of a split: 'train[:90%%]'.")
    group.add_argument("--image_column", default=image_column, help="Column of the images.")
    group.add_argument(
        "--resolution", type=int, help="Side of the images in pixels (paper: 256). Default: the RQ-VAE's."
    )
    group.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Read as it is needed, without preparing the data set first. Training needs --max_train_steps where the "
        "length is not known; a resumed run reads again what it had read of the epoch.",
    )
    group.add_argument(
        "--shuffle_buffer_size",
        type=int,
        default=1000,
        help="Rows among which a stream is shuffled, besides its files.",
    )
    group.add_argument(
        "--filter_column",
        help="Keep only rows whose number in this column is within the two bounds below: drops unwanted "
        "samples, as the paper's supplement D.5 does. 'json.width' is a field of a column.",
    )
    group.add_argument("--filter_min", type=float, help="Keep rows with at least this.")
    group.add_argument("--filter_max", type=float, help="Keep rows with at most this.")
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="Processes (of a stream, threads) that decode images ahead. 0 decodes in between.",
    )
    return group


def add_validation_flags(group) -> None:
    """The held-out splits of the data of [`add_data_flags`]."""
    group.add_argument(
        "--validation_data_files",
        nargs="+",
        help="Files of the validation split, for a training split by --data_files.",
    )
    group.add_argument(
        "--validation_split",
        nargs="+",
        help="One or several, each with figures of its own; 'none' trains without. Default: validation "
        "or test, if there is one.",
    )
    group.add_argument(
        "--max_validation_images",
        type=int,
        default=5000,
        help="Images of each validation split; every process holds them, and as many of the training split.",
    )


def add_flip_and_crop_flags(group, random_flip: bool, random_crop: bool) -> None:
    """How an image may look to the RQ-VAE."""
    group.add_argument(
        "--random_flip",
        action=SwitchGiven,
        default=random_flip,
        help="Mirror half of the images, chosen anew each epoch (RQ-VAE authors: on ImageNet).",
    )
    group.add_argument(
        "--random_crop",
        action=SwitchGiven,
        default=random_crop,
        help="A random square of the resized image instead of the center (RQ-VAE authors: on ImageNet).",
    )


def add_view_flags(group, random_flip: bool, random_crop: bool) -> None:
    """How an image may look when it is encoded. Which of them were given is noted: codes of a data set have no say."""
    add_flip_and_crop_flags(group, random_flip, random_crop)
    group.add_argument(
        "--tau",
        action=StoreGiven,
        type=float,
        default=0.0,
        help="Draw codes from softmax(-distance^2 / tau) instead of taking the nearest. The authors' "
        "RQ-Transformers were trained with 0.5.",
    )
    group.add_argument(
        "--num_draws",
        action=StoreGiven,
        type=int,
        default=1,
        help="Views that a cache keeps of each image, with another crop and other codes each; with "
        "--random_flip as many mirrored ones.",
    )
    group.add_argument("--encoding_batch_size", type=int, default=64, help="Images that a cache encodes at once.")


def add_optimization_flags(parser: argparse.ArgumentParser, **recipe: tuple) -> argparse._ArgumentGroup:
    """Batch, length, optimizer and precision of a training run.

    Args:
        recipe: By flag, its default, and what its help says of where that is from. The recipe of a script is thus in
            one place.
    """
    group = parser.add_argument_group("optimization")

    def add(name: str, kind: type, help: str, *default, choices: list[str] | None = None) -> None:
        """Without a default the recipe must have one."""
        value, source = recipe.pop(name) if name in recipe or not default else (*default, "")
        group.add_argument(f"--{name}", type=kind, default=value, choices=choices, help=f"{help} {source}".strip())

    add("train_batch_size", int, "Images per process and micro-batch.")
    add("gradient_accumulation_steps", int, "Micro-batches of a batch; the gradient is that of the large batch.", 1)
    add("num_train_epochs", int, "Passes over the data.", None)
    add("max_train_steps", int, "Optimizer steps; overrides --num_train_epochs.", None)
    add("max_train_seconds", float, "Stop cleanly after this long, the learning rate's cosine at 0.", None)
    add("learning_rate", float, "After the warm-up.")
    add("lr_scheduler", str, "After the warm-up; cosine goes down to 0.", "cosine", choices=["cosine", "constant"])
    add("lr_warmup_steps", int, "Linear.", 0)
    add("adam_beta1", float, "Of Adam.")
    add("adam_beta2", float, "Of Adam.")
    add("max_grad_norm", float, "0 does not clip.")
    add("ema_decay", float, "Of averaged weights, which are exported; 0 turns averaging off.")
    add("max_nonfinite_steps", int, "Steps whose loss or gradient is NaN or infinite are left out; so many in a row "
        "end the run.", 10)  # fmt: skip
    add("mixed_precision", str, "Default: as `accelerate config` has it.", None, choices=["no", "fp16", "bf16"])
    add("seed", int, "Of all random numbers.", 0)
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="Compute activations again in the backward pass instead of keeping them: less memory, "
                       "more time.")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="Compile the model's blocks (torch.compile).")
    if recipe:
        raise TypeError(f"`recipe` has no flags {sorted(recipe)}.")
    return group


def add_output_flags(
    parser: argparse.ArgumentParser, output_dir: str, result: str, validation: str
) -> argparse._ArgumentGroup:
    """Where a training run writes what, and how often.

    Args:
        output_dir (`str`): The default.
        result (`str`), validation (`str`): What it writes at the end and when it validates, for the help.
    """
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default=output_dir, help=f"Folder of the log, checkpoints and the {result}.")
    group.add_argument("--logging_steps", type=int, default=50, help="Steps between two lines of the log.")
    group.add_argument(
        "--validation_steps", type=int, default=1000, help=f"Steps between two validations: {validation}."
    )
    group.add_argument("--checkpointing_steps", type=int, default=1000, help="Steps between two checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep so many, the newest. Default: all.")
    group.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or 'latest' for the newest, if any.")
    group.add_argument(
        "--overwrite_output_dir", action="store_true", help="Begin anew where a run is; its checkpoints and grids go."
    )
    group.add_argument(
        "--report_to",
        help="tensorboard, wandb, trackio or another tracker of accelerate's, or 'all', besides train_log.jsonl.",
    )
    group.add_argument("--push_to_hub", action="store_true", help=f"Upload the {result} and its log to the Hub.")
    group.add_argument("--hub_model_id", help="Repository to push to. Default: the name of --output_dir.")
    group.add_argument("--hub_token", help="Default: of `hf auth login`.")
    group.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")
    return group


def add_codes_flags(group, condition_dropout: float | None = None) -> None:
    """What the second stage's optimization has beside [`add_optimization_flags`]."""
    group.add_argument("--adam_weight_decay", type=float, default=1e-4, help="Of AdamW. Paper: 1e-4.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Of AdamW.")
    group.add_argument(
        "--condition_dropout",
        type=float,
        default=condition_dropout,
        help="Share of conditions replaced by the null condition, for guidance. "
        + ("Default: 0.1, or 0 for a model without a null condition. " if condition_dropout is None else "")
        + "Not published.",
    )
    group.add_argument(
        "--stratified_masks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Spread the mask ratios of a batch evenly over their distribution, which is the paper's "
        "cos(pi r / 2). Paper: independent.",
    )
    group.add_argument(
        "--attention_backend",
        help="As `set_attention_backend` takes it. On the CPU '_native_math' trains a third faster "
        "than the default: stacks of D codes are too short for the blocked kernel.",
    )


def add_training_flags(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Optimization and output of the second stage. What the help gives as the paper's is from its section on training
    details, and as the RQ-VAE authors' from their configuration files, for what the paper leaves out."""
    group = add_optimization_flags(
        parser,
        train_batch_size=(256, "Total batch of the RQ-VAE authors: 2048, which is the default on 8 devices; the paper "
                          "does not say."),
        num_train_epochs=(300, "Paper: 300."),
        learning_rate=(1e-4, "Paper: 1e-4."),
        lr_scheduler=("cosine", "Paper: cosine."),
        lr_warmup_steps=(0, "RQ-VAE authors: 0."),
        adam_beta1=(0.9, "Paper: 0.9."),
        adam_beta2=(0.95, "Paper: 0.95."),
        max_grad_norm=(1.0, "RQ-VAE authors: 1."),
        ema_decay=(0.9999, "At most this: a warm-up takes min(decay, 1 - (1 + step)^(-2/3)), 0.9997 after 187,000 "
                   "steps. Not published."),
        mixed_precision=(None, "RQ-VAE authors: fp16."),
    )  # fmt: skip
    add_codes_flags(group)
    group = add_output_flags(parser, output_dir, "pipeline", "losses and a grid of samples")
    group.add_argument("--num_validation_images", type=int, default=16, help="Images of a sample grid; 0: no grid.")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse, with a `ValueError`, numbers out of range and sources that exclude each other.

    Flags that a script does not have are passed over.
    """

    def given(name: str, default=None):
        return getattr(args, name, default)

    for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps",
                 "logging_steps", "validation_steps", "max_validation_images", "checkpointing_steps",
                 "checkpoints_total_limit", "encoding_batch_size", "num_draws", "shuffle_buffer_size",
                 "max_nonfinite_steps", "rows_per_file", "validation_batch_size", "discriminator_channels",
                 ):  # fmt: skip
        if given(name) is not None and given(name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {given(name)}.")
    for name in ("dataloader_num_workers", "num_validation_images", "lr_warmup_steps", "learning_rate", "tau", "seed",
                 "max_grad_norm", "adam_weight_decay"):  # fmt: skip
        if given(name) is not None and not given(name) >= 0:
            raise ValueError(f"--{name} must not be negative, got {given(name)}.")
    if given("max_train_seconds") is not None and not args.max_train_seconds > 0:
        raise ValueError(f"--max_train_seconds must be positive, got {args.max_train_seconds}.")
    for name in ("ema_decay", "condition_dropout", "adam_beta1", "adam_beta2"):
        if given(name) is not None and not 0 <= given(name) < 1:
            raise ValueError(f"--{name} must lie in [0, 1), got {given(name)}.")
    check_sources(args)
    num_draws = given("num_draws", 1)
    if num_draws > 1 and not given("cache_codes", True):
        raise ValueError(
            f"--num_draws must be 1 without --cache_codes, which keeps them, got {num_draws}: images that are encoded "
            "as they are needed are drawn anew each time."
        )
    if num_draws > 1 and not args.random_crop and args.tau == 0:
        raise ValueError(f"--num_draws must be 1 without --random_crop and --tau: all {num_draws} would be equal.")
    names = given("validation_split")
    if given("validation_data_files") is not None and names not in (None, ["validation"]):
        raise ValueError(
            f"--validation_split must be left out with --validation_data_files, which are the split, got {names}."
        )
    has_bounds = given("filter_min") is not None or given("filter_max") is not None
    if given("filter_column") is not None and not has_bounds:
        raise ValueError("--filter_column must come with --filter_min or --filter_max, got neither.")
    if given("filter_column") is None and has_bounds:
        raise ValueError("--filter_column must say what --filter_min and --filter_max are about, got None.")


def check_sources(args: argparse.Namespace) -> None:
    """Refuse, with a `ValueError`, two places where the data could come from."""
    data_files = getattr(args, "data_files", None)
    if args.train_data_dir is not None and (args.dataset_name is not None or data_files is not None):
        raise ValueError("Give only one of --dataset_name, --train_data_dir and --data_files (or the first and last).")


def tracked(args: argparse.Namespace) -> dict:
    """The flags as trackers take them: numbers, texts and switches, no secrets."""
    return {
        name: value
        for name, value in vars(args).items()
        if isinstance(value, (int, float, str)) and name != "hub_token"
    }
