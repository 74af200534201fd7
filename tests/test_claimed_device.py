"""On an accelerator, as far as a machine without one can show it: no tensor is left behind, no step waits."""

import types

import pytest
import torch
from claimed_device import DEVICE, ClaimedTensor, claimed_device
from components import CONDITIONS, tiny_pipeline, tiny_rq_pipeline, tiny_vae

from rq_draft_revise import DraftAndReviseInpaintPipeline
from rq_draft_revise.training_log import LogWindow


CALLS = {
    "text": dict(prompt=["a cat", "an owl"]),
    "class": dict(class_labels=[2, 0]),
    None: dict(num_images_per_prompt=2),
}
EDIT = dict(image=torch.rand(1, 3, 8, 8), mask_image=torch.ones(1, 1, 8, 8))


def pipeline_of(kind, condition):
    pipe = tiny_rq_pipeline(condition) if kind == "autoregressive" else tiny_pipeline(condition)
    if kind == "inpaint":
        pipe = DraftAndReviseInpaintPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def codes_of(pipe, kind, condition, **kwargs):
    arguments = dict(CALLS[condition], generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)])
    if condition is not None:
        arguments |= dict(guidance_scale=1.7)
    if kind == "inpaint":
        arguments |= EDIT
    return pipe(**arguments | kwargs, output_type="latent").images


def test_the_claimed_device_has_a_devices_rules():
    with claimed_device() as seen:
        ours, theirs = torch.ones(3, device="claimed"), torch.ones(3)
        assert ours.device == DEVICE and isinstance(ours + 1, ClaimedTensor)
        for wrong in (
            lambda: ours + theirs,
            lambda: theirs[torch.zeros(1, dtype=torch.int64, device="claimed")],
            lambda: torch.rand(2, device="claimed", generator=torch.Generator()),
            lambda: ours.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert not seen.waits
        waits = (ours.sum().item, ours.cpu, ours.nonzero, lambda: theirs.to("claimed"))
        for number, wait in enumerate(waits, start=1):
            wait()
            assert seen.waits.total() == number
        theirs.to("claimed", non_blocking=True)
        assert seen.waits.total() == 4


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("kind", ["draft and revise", "inpaint", "autoregressive"])
def test_a_pipeline_draws_on_a_device_what_it_draws_on_the_cpu(kind, condition):
    pipe = pipeline_of(kind, condition)
    expected = codes_of(pipe, kind, condition)
    selections = [{}] if kind == "autoregressive" else [{"selection": name} for name in ("top-c", "top-c-50%")]
    with claimed_device():
        pipe.to("claimed")
        codes = codes_of(pipe, kind, condition)
        assert codes.device == DEVICE and torch.equal(codes.held, expected)
        images = [
            pipe(**CALLS[condition], **(EDIT if kind == "inpaint" else {}), **choice, top_k=10, top_p=0.9).images
            for choice in selections
        ]
    assert all(image.size == (8, 8) for batch in images for image in batch)


def count(kind, num_steps, **kwargs):
    """Waits and kernels of a call that is not guided, so that only the number of its steps differs."""
    pipe = pipeline_of(kind, "class")
    with claimed_device() as seen:
        pipe.to("claimed")
        seen.waits.clear()
        seen.kernels.clear()
        steps = dict(num_inference_steps=num_steps, num_revise_steps=num_steps, num_revisions=1)
        codes_of(pipe, kind, "class", guidance_scale=1.0, **steps, **kwargs)
        return seen.waits.total(), seen.kernels.total()


@pytest.mark.parametrize("selection", ["random", "top-c-50%"])
@pytest.mark.parametrize("kind", ["draft and revise", "inpaint"])
def test_no_step_waits_for_the_device(kind, selection):
    assert count(kind, 4, selection=selection)[0] == count(kind, 16, selection=selection)[0]


def test_a_step_outside_of_the_transformer_is_two_kernels():
    pipe = pipeline_of("draft and revise", "class")
    with claimed_device() as seen, torch.no_grad():
        pipe.to("claimed")
        arguments = dict(
            codes=pipe.prepare_latents(2),
            positions=torch.zeros(2, 1, dtype=torch.int64, device="claimed"),
            uniforms=torch.zeros(2, 1, pipe.transformer.config.code_depth, device="claimed"),
            prefix_key_values=pipe.encode_condition(class_labels=[2, 0]),
            temperature=torch.ones((), device="claimed"),
        )
        seen.kernels.clear()
        pipe.transformer(**arguments)
        of_the_transformer = seen.kernels.total()
    # 24 more steps, each of which masks its block and writes it
    kernels = count("draft and revise", 16)[1] - count("draft and revise", 4)[1]
    assert kernels == 24 * (of_the_transformer + 2)


def test_numbers_of_the_codebook_stay_on_the_device_and_go_on_after_a_resume():
    alone = dict(device=DEVICE, process_index=0, num_processes=1, gather=lambda tensor: tensor)
    accelerator = types.SimpleNamespace(**alone, reduce=lambda tensor, how: tensor)
    with claimed_device():
        vae = tiny_vae().to("claimed")
        for _ in range(2):  # with restarts and without
            output = vae.update_codebook(torch.randn(4, 16, 4, 4, device="claimed"), torch.Generator().manual_seed(0))
            assert all(isinstance(value, ClaimedTensor) for value in output.values())
        window = LogWindow(accelerator)
        window.add(dict(output))
        window = LogWindow(accelerator, window.state())
        window.add(dict(output))
        assert window.means()["restarts"] == output.restarts.tolist()
