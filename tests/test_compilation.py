"""What a CUDA graph of the transformer's call needs, as far as a machine without a GPU can show it.

Such a graph replays kernels on the device alone, and writes its results to the same memory each time. So a step may
not touch a tensor on the CPU nor wait for the device, and no pipeline may read a result once the next call has begun.
"""

import pytest
import torch
from components import CONDITIONS, tiny_pipeline, tiny_rq_pipeline
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndReviseInpaintPipeline,
    RQTransformerModel,
)


KINDS = {"class": dict(num_classes=10), "text": dict(text_vocab_size=50, max_text_length=6), None: {}}
CALLS = {"class": dict(class_labels=[2, 0]), "text": dict(prompt=["a cat", "an owl"]), None: {}}


class DevicesOfOperations(TorchDispatchMode):
    """Collects the device types of all that operations take and give."""

    def __init__(self):
        super().__init__()
        self.operations = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self.operations.setdefault(leaf.device.type, set()).add(str(function))
        return result


def devices_of(function) -> dict[str, set[str]]:
    with torch.no_grad(), DevicesOfOperations() as devices:
        function()
    return devices.operations


# Tensors without memory, on a device that need not exist: what depends on data, `.item()` say, is an error with them.
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_step_stays_on_the_device(condition, guided):
    guided = guided and condition is not None
    with FakeTensorMode(), torch.device("cuda"):
        model = ContextualRQTransformerModel(num_spatial_layers=2, num_depth_layers=2, **KINDS[condition]).eval()
        config, rows = model.config, 3 * (1 + guided)
        arguments = dict(
            codes=torch.zeros(3, 8, 8, 4, dtype=torch.int64),
            positions=torch.zeros(3, 5, dtype=torch.int64),
            uniforms=torch.zeros(3, 5, 4),
            temperature=torch.tensor(0.8),
            guidance_scale=torch.tensor(1.8) if guided else None,
            top_k=100,
            top_p=0.9,
        )
        if condition is not None:
            heads = (config.num_attention_heads, config.attention_head_dim)
            arguments["prefix_key_values"] = torch.zeros(2, 2, rows, model.prefix_length, *heads)
        assert set(devices_of(lambda: model(**arguments))) == {"cuda"}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_autoregressive_step_stays_on_the_device(condition, guided):
    guided = guided and condition is not None
    with FakeTensorMode(), torch.device("cuda"):
        options = dict(null_condition=condition is not None, num_spatial_layers=2, num_depth_layers=2)
        model = RQTransformerModel(**options, **KINDS[condition]).eval()
        rows, codes = 3 * (1 + guided), torch.zeros(3, 8, 8, 4, dtype=torch.int64)
        arguments = {}
        if condition == "class":
            arguments = dict(class_labels=torch.zeros(rows, dtype=torch.int64))
        elif condition == "text":
            arguments = dict(input_ids=torch.zeros(rows, model.prefix_length, dtype=torch.int64))
        with torch.no_grad():
            arguments["past_key_values"] = model(**arguments or dict(codes=codes)).past_key_values
        arguments |= dict(
            codes=codes,
            position=torch.zeros(1, dtype=torch.int64),
            uniforms=torch.zeros(3, 4),
            temperature=torch.tensor(0.8),
            guidance_scale=torch.tensor(1.8) if guided else None,
            top_k=100,
            top_p=0.9,
        )
        assert set(devices_of(lambda: model(**arguments))) == {"cuda"}


def test_the_watch_sees_a_tensor_on_the_cpu():
    with FakeTensorMode():
        assert set(devices_of(lambda: torch.zeros(3, device="cuda") + torch.tensor(2.0))) == {"cuda", "cpu"}


def overwrite_results_at_the_next_call(monkeypatch, model) -> None:
    """As a CUDA graph does: each call first spoils what the last one returned, but for what that had been given."""
    forward, last = model.forward, []

    def call(*args, **kwargs):
        for result in last:
            result.fill_(torch.nan if result.is_floating_point() else -1)
        last.clear()
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        output = forward(*args, **kwargs)
        last.extend(x for x in output.values() if x.untyped_storage().data_ptr() not in given)
        return output

    monkeypatch.setattr(model, "forward", call)


def codes_of(pipe, condition, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = CALLS[condition] or dict(latents=pipe.prepare_latents(2))
    if condition is not None:
        arguments |= dict(guidance_scale=1.7)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe(**arguments, **options, generator=generators, output_type="latent").images


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("tiny", [tiny_pipeline, tiny_rq_pipeline])
def test_no_result_is_read_after_the_next_call(monkeypatch, tiny, condition):
    pipe = tiny(condition)
    expected = codes_of(pipe, condition)
    overwrite_results_at_the_next_call(monkeypatch, pipe.transformer)
    assert torch.equal(codes_of(pipe, condition), expected)


def test_no_result_is_read_after_the_next_call_while_guidance_is_turned_on(monkeypatch):
    pipe = tiny_pipeline("text")

    def turn_on(pipe, step, timestep, callback_kwargs):
        pipe._draft_guidance_scale = 1.5

    options = dict(callback_on_step_end=turn_on, guidance_scale=1.0)
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", **options, generator=generator, output_type="latent").images

    expected = run()
    overwrite_results_at_the_next_call(monkeypatch, pipe.transformer)
    assert torch.equal(run(), expected)


def test_no_result_is_read_after_the_next_call_while_inpainting(monkeypatch):
    pipe = DraftAndReviseInpaintPipeline(**tiny_pipeline("text").components)
    image, mask = Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 8), 255)
    arguments = dict(prompt="a cat", image=image, mask_image=mask, output_type="latent")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    overwrite_results_at_the_next_call(monkeypatch, pipe.transformer)
    assert torch.equal(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images, expected)
