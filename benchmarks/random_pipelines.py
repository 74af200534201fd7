"""Pipelines of given configs with random weights, which cost what trained ones cost, and their compilation."""

import contextlib
import json
from pathlib import Path

import torch
from cuda_graphs import GraphedCall
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerModel,
    RQTransformerPipeline,
    RQVAEModel,
)


@contextlib.contextmanager
def built(dtype: torch.dtype, device: torch.device):
    """What is made inside is made in this dtype, there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_pipeline(folder: Path, dtype: torch.dtype, device: torch.device):
    """The pipeline of a folder's configs with random weights."""
    index = json.loads((folder / "model_index.json").read_text())
    draft_and_revise = index["_class_name"] == "DraftAndRevisePipeline"
    model = ContextualRQTransformerModel if draft_and_revise else RQTransformerModel
    with built(dtype, device):
        vae = RQVAEModel.from_config(RQVAEModel.load_config(folder / "vae")).eval()
        transformer = model.from_config(model.load_config(folder / "transformer")).eval()
        vae.quantizer.codebook.copy_(torch.randn_like(vae.quantizer.codebook))
        vae.quantizer.codebook[:, -1] = 0
        transformer.set_codebook(vae.quantizer.codebook)
    tokenizer = word_tokenizer(transformer.config)
    if draft_and_revise:
        scheduler = DraftAndReviseScheduler.from_config(DraftAndReviseScheduler.load_config(folder / "scheduler"))
        pipe = DraftAndRevisePipeline(vae, transformer, scheduler, tokenizer=tokenizer)
    else:
        pipe = RQTransformerPipeline(vae, transformer, tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def word_tokenizer(config) -> PreTrainedTokenizerFast | None:
    """Any that gives a text-conditional model tokens it knows."""
    if config.text_vocab_size is None:
        return None
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def compile_step(pipe, mode: str) -> None:
    """Make the transformer's call faster.

    With `blocks` each of its blocks is compiled, as diffusers' `compile_repeated_blocks` does it: seconds instead of
    minutes of compilation, but no CUDA graph of a whole step. With `cudagraphs` the eager kernels of the call are
    replayed as such a graph, with `blocks-cudagraphs` those of compiled blocks. Any other mode is one of
    `torch.compile`, a graph a shape. (Of the baseline's cache that makes a copy for each layer, as the layers' parts
    are views that are written to.)

    The baseline's cache stays at one address: a CUDA graph writes where it wrote when it was recorded.
    """
    if mode == "eager":
        return
    if mode.startswith("blocks"):
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        if mode == "blocks":
            return
    if mode in ("cudagraphs", "blocks-cudagraphs"):
        pipe.transformer.forward = GraphedCall(pipe.transformer.forward, in_place=("past_key_values",))
    else:
        pipe.transformer.compile(fullgraph=True, dynamic=False, mode=mode)
    if isinstance(pipe, DraftAndRevisePipeline):
        return
    encode_condition, caches = pipe.encode_condition, {}

    def encode_in_place(*args, **kwargs):
        condition = encode_condition(*args, **kwargs)
        new = condition["past_key_values"]
        if new.shape not in caches:
            caches[new.shape] = torch.empty_like(new)
            torch._dynamo.mark_static_address(caches[new.shape])
        return condition | {"past_key_values": caches[new.shape].copy_(new)}

    pipe.encode_condition = encode_in_place
