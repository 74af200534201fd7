"""Pipelines whose transformer is compiled draw what they draw otherwise, in as many shapes as users ask for.

And what a CUDA graph of the transformer's call needs, as far as a machine without a GPU can show it. Such a graph
replays kernels on the device alone, and writes its results to the same memory each time. So a step may not touch a
tensor on the CPU nor wait for the device, and no pipeline may read a result once the next call has begun.
"""

from functools import partialmethod

import pytest
import torch
from claimed_device import claimed_device
from components import CONDITIONS, tiny_pipeline, tiny_rq_pipeline
from cuda_graphs import GraphedCall
from PIL import Image
from random_pipelines import compile_step
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndReviseInpaintPipeline,
    RQTransformerModel,
)


# Shapes of a long session, more than the eight for which torch compiles one function.
SESSION = [
    dict(),
    dict(draft_guidance_scale=1.5),
    dict(num_images_per_prompt=2),
    dict(num_images_per_prompt=3, num_inference_steps=5),
    dict(selection="top-c"),
    dict(selection="top-c-50%", num_images_per_prompt=2, guidance_scale=1.0),
    dict(num_inference_steps=16, num_revise_steps=3),
    dict(num_images_per_prompt=4, draft_guidance_scale=1.5, num_inference_steps=2),
]


def session(pipe) -> list[torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)
    images = []
    for options in SESSION:
        options = dict(guidance_scale=1.7) | options
        generator = torch.Generator().manual_seed(0)
        images.append(pipe("a cat", **options, generator=generator, output_type="latent").images)
    return images


def test_compiled_blocks_serve_all_shapes(fresh_compiler):
    pipe = tiny_pipeline("text")
    expected = session(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for ours, reference in zip(session(pipe), expected, strict=True):
        assert torch.equal(ours, reference)


def test_compiled_blocks_fill_masks_of_all_sizes(fresh_compiler):
    pipe = DraftAndReviseInpaintPipeline(**tiny_pipeline("text").components)
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (8, 8), "red")

    def fill(size):
        mask = Image.new("L", (8, 8), 0)
        mask.paste(255, (0, 0, size, size))
        arguments = dict(prompt="a cat", image=image, mask_image=mask, guidance_scale=1.7, output_type="latent")
        return pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

    expected = [fill(size) for size in (2, 4, 6, 8)]
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for size, reference in zip((2, 4, 6, 8), expected, strict=True):
        assert torch.equal(fill(size), reference)


def test_a_compiled_transformer_needs_three_graphs_for_a_call(fresh_compiler):
    """The condition, a step of the draft, a step of a revision. Beyond torch's eight, calls go on without."""
    pipe = tiny_pipeline("text")
    expected = session(pipe)
    pipe.transformer.compile(dynamic=False, backend="eager")
    pipe("a cat", guidance_scale=1.7, num_inference_steps=4)
    assert counters["stats"]["unique_graphs"] == 3
    for ours, reference in zip(session(pipe), expected, strict=True):
        assert torch.equal(ours, reference)


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


# The meta device stands for a GPU: tensors without memory, with which what depends on data, `.item()` say, fails.
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_step_stays_on_the_device(condition, guided):
    guided = guided and condition is not None
    with torch.device("meta"):
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
        assert set(devices_of(lambda: model(**arguments))) == {"meta"}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_autoregressive_step_stays_on_the_device(condition, guided):
    guided = guided and condition is not None
    with torch.device("meta"):
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
        assert set(devices_of(lambda: model(**arguments))) == {"meta"}


def test_the_watch_sees_a_tensor_on_the_cpu():
    assert set(devices_of(lambda: torch.zeros(3, device="meta") + torch.tensor(2.0))) == {"meta", "cpu"}


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


class Recorder:
    """Stands for CUDA graphs: a replay computes anew, into the memory of the first results."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function):
        self.recorded += 1
        result = function()

        def replay():
            for old, new in zip(tree_leaves(result), tree_leaves(function()), strict=True):
                old.data.copy_(new)  # as a graph does: no version counter is told

        return result, replay


@pytest.mark.parametrize("mode, condition", [*(("cudagraphs", c) for c in CONDITIONS), ("blocks-cudagraphs", "class")])
@pytest.mark.parametrize("tiny", [tiny_pipeline, tiny_rq_pipeline])
def test_replayed_calls_draw_the_same(monkeypatch, fresh_compiler, tiny, mode, condition):
    pipe, recorder = tiny(condition), Recorder()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    monkeypatch.setattr("cuda_graphs.CUDAGraphRecorder", lambda: recorder)
    steps = [{}, {}] if tiny is tiny_rq_pipeline else [dict(num_inference_steps=n, num_revisions=2) for n in (4, 2, 4)]
    expected = [codes_of(pipe, condition, **options) for options in steps]
    compile_step(pipe, mode)
    recorded = []
    for options, reference in zip(steps, expected, strict=True):
        assert torch.equal(codes_of(pipe, condition, **options), reference)
        recorded.append(recorder.recorded)
    assert 0 < recorded[0] <= 3 and recorded[-1] == recorded[-2]  # nothing is recorded again


def test_only_inputs_that_have_changed_are_copied():
    def add(a, b):
        return a + b

    call = GraphedCall(add, recorder=Recorder)
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    total = call(a, b)
    assert total.tolist() == [6, 8]
    (inputs, *_) = call._graphs[next(iter(call._graphs))]
    versions = [own._version for own in inputs]
    assert call(a, b[:]).tolist() == [6, 8]
    assert [own._version for own in inputs] == versions
    b.add_(1)
    assert call(a, b).tolist() == [7, 9]
    assert call(total, b).tolist() == [13, 16]  # what it has returned
    assert call(total, b).tolist() == [19, 23]  # and has written over since
    call.clear()
    assert call(a, b).tolist() == [7, 9] and len(call._graphs) == 1


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("tiny", [tiny_pipeline, tiny_rq_pipeline])
def test_what_is_recorded_does_not_wait_for_the_device(tiny, guided):
    pipe = tiny("class")
    pipe.set_progress_bar_config(disable=True)
    with claimed_device() as seen:
        pipe.to("claimed")
        forward, waits = pipe.transformer.forward, []

        def call(*args, **kwargs):
            before = seen.waits.total()
            result = forward(*args, **kwargs)
            waits.append(seen.waits.total() - before)
            return result

        pipe.transformer.forward = call
        pipe(class_labels=[1, 2], guidance_scale=1.7 if guided else 1.0, output_type="latent")
    assert len(waits) > 4 and not any(waits)
