"""Tiny real components: the package's own classes, small enough that a test of a law takes a fraction of a second.

8×8 pixels, code maps of 4×4×3 over a codebook of 50, d = 32, 2 + 2 blocks. Everything is a function of `seed` and of
the arguments; the global random state is left as it was. Models come in eval mode, with dropout 0.

And real processes, for what must be true of two: [`run_in_two_processes`].
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerModel,
    RQTransformerPipeline,
    RQVAEModel,
)


CODEBOOK_SIZE = 50
CODE_DEPTH = 3
CODEBOOK_DIM = 16
NUM_CLASSES = 5
MAX_TEXT_LENGTH = 6
WORDS = ["[PAD]", "[UNK]", "a", "an", "at", "cat", "dusk", "in", "night", "owl", "rocket", "snow", "the", "volcano"]
CONDITIONS = ("class", "text", None)
# What a transformer over codes has at least one of.
SIZES = ("height", "width", "code_depth", "codebook_size", "codebook_dim", "num_spatial_layers", "num_attention_heads",
         "attention_head_dim", "num_classes", "text_vocab_size", "max_text_length")  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def seeded(seed: int):
    """The global random state is `seed` inside and as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_vae(seed: int = 0, **config) -> RQVAEModel:
    """An RQ-VAE whose codebook has the spread of its latents, as after training: codes differ between positions."""
    arguments = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CODEBOOK_DIM,
        codebook_size=CODEBOOK_SIZE,
        code_depth=CODE_DEPTH,
        sample_size=8,
    )
    with seeded(seed):
        vae = RQVAEModel(**{**arguments, **config})
        vectors = vae.quantizer.codebook[:, :-1]
        vectors.copy_(0.3 * torch.randn_like(vectors))
    return vae.eval()


def tiny_transformer(
    condition: str | None = "class",
    code_depth: int = CODE_DEPTH,
    seed: int = 0,
    vae: RQVAEModel | None = None,
    **config,
) -> ContextualRQTransformerModel:
    """A transformer that reads codes in the codebook of `vae`, by default of `tiny_vae` at the same depth and seed.

    Its weights are large and its biases not zero: at initialization all logits are nearly equal, and laws hold of
    themselves.
    """
    if vae is None:
        names = ("codebook_size", "shared_codebook")
        vae = tiny_vae(seed, code_depth=code_depth, **{name: config[name] for name in names if name in config})
    arguments = dict(
        height=4,
        width=4,
        code_depth=vae.config.code_depth,
        codebook_size=vae.config.codebook_size,
        codebook_dim=vae.config.latent_channels,
        shared_codebook=vae.config.shared_codebook,
        num_spatial_layers=2,
        num_depth_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        dropout=0.0,
        max_text_length=MAX_TEXT_LENGTH,
    )
    if condition == "class":
        arguments["num_classes"] = NUM_CLASSES
    elif condition == "text":
        arguments["text_vocab_size"] = len(WORDS)
    elif condition is not None:
        raise ValueError(f"`condition` must be one of {CONDITIONS}, got {condition!r}.")
    with seeded(seed):
        transformer = ContextualRQTransformerModel(**{**arguments, **config})
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    transformer.set_codebook(vae.quantizer.codebook)
    return transformer.eval()


def tiny_rq_transformer(
    condition: str | None = "class",
    code_depth: int = CODE_DEPTH,
    seed: int = 0,
    vae: RQVAEModel | None = None,
    **config,
) -> RQTransformerModel:
    """As `tiny_transformer`, for the autoregressive baseline, with a null condition."""
    if condition not in CONDITIONS:
        raise ValueError(f"`condition` must be one of {CONDITIONS}, got {condition!r}.")
    if vae is None:
        vae = tiny_vae(seed, code_depth=code_depth, shared_codebook=config.get("shared_codebook", True))
    arguments = dict(
        height=4,
        width=4,
        code_depth=vae.config.code_depth,
        codebook_size=vae.config.codebook_size,
        codebook_dim=vae.config.latent_channels,
        num_spatial_layers=2,
        num_depth_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        dropout=0.0,
        num_classes=NUM_CLASSES if condition == "class" else None,
        text_vocab_size=len(WORDS) if condition == "text" else None,
        max_text_length=MAX_TEXT_LENGTH,
        null_condition=condition is not None,
    )
    with seeded(seed):
        transformer = RQTransformerModel(**{**arguments, **config})
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    transformer.set_codebook(vae.quantizer.codebook)
    return transformer.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, `WORDS` in order; others are `[UNK]`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=MAX_TEXT_LENGTH
    )


def tiny_pipeline(condition: str | None = "text", seed: int = 0, scheduler: dict | None = None, **config):
    """A pipeline of the above in few steps; `scheduler` changes its defaults, `config` those of the transformer."""
    vae = tiny_vae(seed)
    defaults = dict(num_inference_steps=4, num_revise_steps=2, num_revisions=1)
    return DraftAndRevisePipeline(
        vae=vae,
        transformer=tiny_transformer(condition, seed=seed, vae=vae, **config),
        scheduler=DraftAndReviseScheduler(**{**defaults, **(scheduler or {})}),
        tokenizer=tiny_tokenizer() if condition == "text" else None,
        id2label={i: f"class {i}, alias {i}" for i in range(NUM_CLASSES)} if condition == "class" else None,
    )


def tiny_rq_pipeline(condition: str | None = "text", seed: int = 0, defaults: dict | None = None, **config):
    """The baseline's pipeline; `defaults` are those of its call, `config` is the transformer's."""
    vae = tiny_vae(seed)
    return RQTransformerPipeline(
        vae=vae,
        transformer=tiny_rq_transformer(condition, seed=seed, vae=vae, **config),
        tokenizer=tiny_tokenizer() if condition == "text" else None,
        id2label={i: f"class {i}, alias {i}" for i in range(NUM_CLASSES)} if condition == "class" else None,
        **(defaults or {}),
    )


def random_pixels(batch_size: int = 2, size: int = 8, seed: int = 0) -> torch.Tensor:
    """`(batch_size, 3, size, size)` in `[-1, 1]`."""
    return 2 * torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def random_codes(model, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    """A code map of `model` `(batch_size, 4, 4, code_depth)` without a mask; other sizes where it has them."""
    shape = (batch_size, model.config.get("height", 4), model.config.get("width", 4), model.config.code_depth)
    return torch.randint(model.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def random_condition(
    model: ContextualRQTransformerModel | RQTransformerModel, batch_size: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The keyword argument that conditions `model`, without null conditions; empty for an unconditional one."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.num_classes is not None:
        return {"class_labels": torch.randint(model.config.num_classes, (batch_size,), generator=generator)}
    if model.config.text_vocab_size is not None:
        shape = (batch_size, model.config.max_text_length)
        return {"input_ids": torch.randint(model.config.text_vocab_size, shape, generator=generator)}
    return {}


# ---------------------------------------------------------------------------------------------------------- processes


def run_in_two_processes(program: str, folder: Path, timeout: float = 600) -> None:
    """Run the Python text `program` in two processes on the CPU, started by torchrun. `sys.argv[1]` is `folder`.

    It can import the package, the scripts of `examples` and the tests. Importing takes longest: one start should do
    for all tests of a module.
    """
    (folder / "program.py").write_text("import torch\n\ntorch.set_num_threads(1)\n" + program)
    path = [str(ROOT / name) for name in ("src", "examples", "tests")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(folder / "program.py"), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def forget_accelerator() -> None:
    """accelerate's state is one a process: a second run in it would go on with that of the first."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def one_process_group():
    """The runs inside share a process group. A second one would find the first's addresses in torchrun's store."""
    leave = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None
    yield
    dist.destroy_process_group = leave
    leave()
