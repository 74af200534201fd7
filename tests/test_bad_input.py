"""Bad input: a `ValueError` that teaches, before any work, and nothing has changed.

A bad call is a good one in which one or two arguments are replaced. Its error names one of them.
"""

import re

import numpy as np
import pytest
import torch
from components import CODE_DEPTH, CODEBOOK_SIZE, NUM_CLASSES, random_codes, tiny_pipeline, tiny_transformer, tiny_vae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_draft_revise import DraftAndRevisePipeline, DraftAndReviseScheduler


MASK = CODEBOOK_SIZE
HUGE = 2**62

# Values that are wrong for what they are to be


def anything_but(*kinds: str):
    """Python objects of a kind that an argument does not take."""
    objects = dict(
        none=st.none(),
        boolean=st.booleans() | st.just(np.True_),
        integer=st.integers(),
        float=st.floats(),
        text=st.text(max_size=6),
        list=st.lists(st.integers() | st.none() | st.text(max_size=2), max_size=3),
        tuple=st.just(()) | st.tuples(st.integers()),
        dict=st.just({}) | st.just({"a": 1}),
        bytes=st.binary(max_size=3),
        complex=st.just(1 + 2j) | st.just(np.complex64(1)),
        array=st.sampled_from([np.zeros(3), np.array([1, 2]), np.array("random")]),
        tensor=st.sampled_from([torch.zeros(()), torch.ones(3), torch.tensor(2)]),
        object=st.builds(object) | st.just(int) | st.just(torch.Generator) | st.just(np.random.default_rng(0)),
    )
    return st.one_of(*(strategy for kind, strategy in objects.items() if kind not in kinds))


def integers_outside(low: int, high: int | None = None):
    below = st.integers(max_value=low - 1) | st.just(-(10**30))
    above = st.nothing() if high is None else st.integers(min_value=high + 1) | st.just(10**30)
    return below | above | anything_but("none", "integer", "text") | st.text(max_size=3) | st.floats()


def numbers_outside(low: float, exclusive: bool):
    unreal = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e39, 1e300, 10**400, np.float32("nan")])
    below = st.floats(max_value=low, exclude_max=not exclusive) | st.integers(max_value=int(low) - 1)
    denormal = st.sampled_from([1e-39, 1e-300, 5e-324]) if exclusive else st.nothing()
    return unreal | below | denormal | anything_but("none", "integer", "float")


def shares_outside():
    """Not in (0, 1]."""
    unreal = st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**400])
    return unreal | st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | anything_but("none", "float")


def strings_but(*allowed: str):
    return st.text(max_size=8).filter(lambda text: text not in allowed) | anything_but("none", "text")


@st.composite
def tensors_of_another_shape(draw, good: torch.Tensor, fits=lambda shape: False):
    """Also other ranks and empty ones; `fits` says what would be accepted."""
    shapes = st.lists(st.integers(0, 9), max_size=6).map(tuple)
    shape = list(good.shape)
    if shape:  # one size changed, or a dimension more or less
        axis = draw(st.integers(0, len(shape) - 1))
        size = draw(st.integers(0, 9))
        near = [
            (*shape[:axis], size, *shape[axis + 1 :]),
            (*shape[:axis], *shape[axis + 1 :]),
            (*shape[:axis], 1, *shape[axis:]),
        ]
        shapes = shapes | st.sampled_from(near)
    shape = draw(shapes.filter(lambda shape: tuple(shape) != tuple(good.shape) and not fits(tuple(shape))))
    return torch.zeros(shape, dtype=good.dtype)


def tensors_of_another_dtype(good: torch.Tensor, *also_good: torch.dtype):
    dtypes = {
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    }
    return st.sampled_from(sorted(dtypes - {good.dtype, *also_good}, key=str)).map(good.to)


@st.composite
def tensors_of_values_outside(draw, good: torch.Tensor, low: int, high: int):
    """One value is out of `[low, high]`."""
    bad = good.clone().flatten()
    bad[draw(st.integers(0, bad.numel() - 1))] = draw(
        st.sampled_from([low - 1, high + 1, -HUGE, HUGE]) | st.integers(high + 1, HUGE) | st.integers(-HUGE, low - 1)
    )
    return bad.view(good.shape)


@st.composite
def codes_masked_in_part(draw, good: torch.Tensor):
    bad = good.clone()
    stack = bad.view(-1, bad.shape[-1])[draw(st.integers(0, bad.numel() // bad.shape[-1] - 1))]
    stack[:] = 0
    stack[draw(st.sets(st.integers(0, len(stack) - 1), min_size=1, max_size=len(stack) - 1).map(list))] = MASK
    return bad


def bad_codes(good: torch.Tensor, largest: int = MASK, fits=lambda shape: False):
    return st.one_of(
        tensors_of_another_shape(good, fits),
        tensors_of_another_dtype(good),
        tensors_of_values_outside(good, 0, largest),
        codes_masked_in_part(good),
        anything_but("none", "tensor"),
    )


def bad_generators(batch_size: int):
    good = st.builds(torch.Generator)
    return st.one_of(
        st.lists(good, max_size=5).filter(lambda several: len(several) != batch_size),
        st.lists(anything_but("array") | good, min_size=batch_size, max_size=batch_size).filter(
            lambda several: not all(isinstance(one, torch.Generator) for one in several)
        ),
        anything_but("none"),
    )


# Bad calls: `(function, good arguments, {argument: its bad values})`


def bad_pipeline_calls(condition: str | None):
    pipe = tiny_pipeline(condition)
    pipe.set_progress_bar_config(disable=True)
    latents = random_codes(pipe.transformer, batch_size=2)
    latents[:, 1] = MASK
    arguments = dict(generator=torch.Generator(), num_inference_steps=2, num_images_per_prompt=1)
    words = st.sampled_from(["a cat", "dusk"])
    prompts = words | st.lists(words, min_size=1, max_size=2)
    labels = st.integers(0, NUM_CLASSES - 1)
    bad = dict(
        num_images_per_prompt=integers_outside(1) | st.none(),
        num_inference_steps=integers_outside(1, 16),
        num_revise_steps=integers_outside(1, 16),
        num_revisions=integers_outside(0),
        guidance_scale=numbers_outside(0, exclusive=False),
        draft_guidance_scale=numbers_outside(0, exclusive=False),
        temperature=numbers_outside(0, exclusive=True),
        draft_temperature=numbers_outside(0, exclusive=True),
        selection=strings_but("random", "top-c", "top-c-50%"),
        top_k=integers_outside(1),
        top_p=shares_outside(),
        generator=bad_generators(batch_size=2),
        latents=bad_codes(latents),
        output_type=strings_but("pil", "np", "pt", "latent") | st.none(),
        callback_on_step_end=anything_but("none", "object"),
        callback_on_step_end_tensor_inputs=st.one_of(
            st.lists(
                st.text(max_size=5) | st.sampled_from(["latents", "codes", None, 3]), min_size=1, max_size=3
            ).filter(lambda names: set(names) != {"latents"}),
            st.sampled_from(["latents", "", None, {"latents"}, 3]),
        ),
    )
    if condition == "text":
        arguments |= dict(prompt=["a cat", "a volcano"])
        texts = anything_but("text", "list", "none")
        lists = st.lists(words | st.none() | st.integers() | st.binary(max_size=2), max_size=3).filter(
            lambda several: not several or any(not isinstance(one, str) for one in several)
        )
        empty = st.sampled_from(["", " ", "\n\t", [""], ["a cat", " "]])
        bad["prompt"] = texts | lists | empty | st.none()
        bad["negative_prompt"] = texts | lists | st.lists(words, max_size=4).filter(lambda several: len(several) != 2)
        bad["class_labels"] = labels | st.lists(labels, min_size=1) | st.just("class 1")
    else:
        bad["prompt"] = prompts | st.text() | st.just([])
        bad["negative_prompt"] = prompts
    if condition == "class":
        arguments |= dict(class_labels=[1, "alias 2"])
        good = torch.tensor([1, 2])
        outside = st.integers(max_value=-1) | st.integers(min_value=NUM_CLASSES)
        names = st.text(max_size=8).filter(lambda name: not re.match(r" *(class|alias) [0-4]", name, re.I))
        single = outside | names | anything_but("integer", "text", "list", "tuple", "tensor")
        bad["class_labels"] = st.one_of(
            single,
            st.lists(single, min_size=1, max_size=3),
            st.tuples(labels, single),
            st.tuples(labels, st.lists(labels)).map(list),
            st.just([]) | st.just(()) | st.none(),
            tensors_of_values_outside(good, 0, NUM_CLASSES - 1),
            tensors_of_another_dtype(good, torch.uint8, torch.int8, torch.int16, torch.int32),
            st.sampled_from([torch.zeros(2, 1).long(), torch.zeros(0).long(), torch.zeros(1, 2, 3).long()]),
        )
    if condition is None:
        arguments |= dict(num_images_per_prompt=2)
        scales = st.floats(0, 100).filter(lambda scale: scale != 1) | st.integers(2, 100) | st.just(0)
        for name in ("guidance_scale", "draft_guidance_scale"):
            bad[name] = bad[name] | scales  # a model without a condition has nothing to be guided by
        bad["class_labels"] = labels | st.lists(labels, min_size=1) | st.just("class 1")
    return pipe, arguments, bad


def bad_scheduler_calls(method: str):
    scheduler = DraftAndReviseScheduler(4, num_revise_steps=2, num_revisions=1)
    sample = torch.zeros(2, 3, 3, 2, dtype=torch.int64)
    sample[0] = sample[1, :2] = MASK
    steps = dict(
        num_inference_steps=integers_outside(0),
        num_revise_steps=integers_outside(1),
        num_revisions=integers_outside(0),
    )
    selection = dict(selection=strings_but("random", "top-c", "top-c-50%"))
    if method == "__init__":
        numbers = dict(
            guidance_scale=numbers_outside(0, exclusive=False) | st.none(),
            draft_guidance_scale=numbers_outside(0, exclusive=False) | st.none(),
            temperature=numbers_outside(0, exclusive=True) | st.none(),
            draft_temperature=numbers_outside(0, exclusive=True) | st.none(),
            top_k=integers_outside(1),
            top_p=shares_outside(),
        )
        return DraftAndReviseScheduler, dict(num_inference_steps=3), steps | selection | numbers
    if method == "set_timesteps":
        return scheduler.set_timesteps, dict(num_inference_steps=3), steps | selection
    if method == "set_partitions":
        region = torch.ones(2, 3, 3, dtype=torch.bool)
        bad = dict(
            sample=bad_codes(sample, fits=lambda shape: len(shape) == 4 and min(shape) > 0),
            mask_token_id=integers_outside(1),
            generator=bad_generators(batch_size=2),
            region=st.one_of(
                tensors_of_another_shape(region),
                tensors_of_another_dtype(region),
                anything_but("none", "tensor"),
                st.just(torch.zeros(2, 3, 3, dtype=torch.bool)),
            ),
        )
        return scheduler.set_partitions, dict(sample=sample, mask_token_id=MASK, region=region), bad
    scheduler.set_partitions(sample, MASK, torch.Generator())
    positions = scheduler.get_step_input(sample, 1).positions
    stacks, log_probs = torch.zeros(*positions.shape, 2, dtype=torch.int64), torch.zeros(positions.shape)
    bad = dict(
        timestep=(integers_outside(0, 5) | st.none()).filter(lambda timestep: not isinstance(timestep, torch.Tensor))
        | st.sampled_from([torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(True), torch.tensor(6)]),
        sample=st.one_of(tensors_of_another_shape(sample), tensors_of_another_dtype(sample), anything_but("tensor")),
    )
    if method == "step":
        bad["model_output"] = st.one_of(
            tensors_of_another_shape(stacks).map(lambda bad: (bad, log_probs)),
            tensors_of_another_shape(log_probs).map(lambda bad: (stacks, bad)),
            tensors_of_another_dtype(stacks).map(lambda bad: (bad, log_probs)),
            st.sampled_from([torch.int64, torch.bool]).map(lambda dtype: (stacks, log_probs.to(dtype))),
            st.sampled_from([stacks, (stacks,), (stacks, log_probs, log_probs), [stacks.tolist(), log_probs]]),
            anything_but(),
        )
        return scheduler.step, dict(model_output=(stacks, log_probs), timestep=1, sample=sample), bad
    return scheduler.get_step_input, dict(sample=sample, timestep=1), bad


def bad_vae_calls(method: str):
    vae = tiny_vae()
    if method in ("decode", "embed_codes"):
        codes = random_codes(vae)

        def fits(shape):
            return len(shape) == 4 and shape[-1] == CODE_DEPTH and min(shape) > 0

        bad = dict(codes=bad_codes(codes, fits=fits) | st.none(), depth=integers_outside(1, CODE_DEPTH))
        return getattr(vae, method), dict(codes=codes), bad
    pixels = torch.zeros(2, 3, 8, 8)

    def fits(shape):
        return len(shape) == 4 and min(shape) > 0 and shape[1] == 3 and shape[2] % 2 == shape[3] % 2 == 0

    bad = dict(
        pixel_values=st.one_of(
            tensors_of_another_shape(pixels, fits), tensors_of_another_dtype(pixels), anything_but("tensor")
        )
    )
    if method == "soft_codes":
        bad["tau"] = numbers_outside(0, exclusive=True).filter(
            lambda tau: isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau < float("inf")
        )
        bad["generator"] = anything_but("none")
    return (vae if method == "forward" else getattr(vae, method)), dict(pixel_values=pixels), bad


def bad_transformer_calls(condition: str | None, use: str):
    transformer = tiny_transformer(condition)
    codes = random_codes(transformer)
    labels = codes.clone()
    codes[:, 1:3] = MASK
    positions = torch.tensor([[4, 7, 5], [8, 4, 11]])
    uniforms = torch.rand(2, 3, CODE_DEPTH, generator=torch.Generator().manual_seed(0))
    arguments = dict(codes=codes, positions=positions)
    bad = dict(
        # another batch size makes the other arguments wrong, not the codes
        codes=bad_codes(codes, fits=lambda shape: shape[1:] == codes.shape[1:] and shape[0] > 0),
        positions=st.one_of(
            tensors_of_another_shape(positions, fits=lambda s: use == "labels" and len(s) == 2 and s[0] == 2 and s[1]),
            tensors_of_another_dtype(positions),
            tensors_of_values_outside(positions, 0, 15),
            anything_but("none", "tensor"),
        ),
        temperature=numbers_outside(0, exclusive=True) | st.none() | st.just(torch.tensor(float("nan"))),
        top_k=integers_outside(1),
        top_p=shares_outside(),
    )
    floats = (torch.float16, torch.bfloat16, torch.float64)
    if use == "labels":
        arguments["labels"] = labels
        bad["labels"] = bad_codes(labels, largest=CODEBOOK_SIZE - 1) | st.none()
        bad["uniforms"] = st.just(uniforms[:1])  # one too many, and not good without `labels` either
        bad["guidance_scale"] = st.floats(0, 9)
    else:
        arguments["uniforms"] = uniforms
        bad["uniforms"] = st.one_of(
            tensors_of_another_shape(uniforms),
            tensors_of_another_dtype(uniforms, *floats),
            anything_but("tensor"),
        )
        bad["labels"] = st.just(labels[:1])
        bad["guidance_scale"] = numbers_outside(0, exclusive=False) | st.just(torch.ones(2))
    if condition is None:
        bad |= dict(class_labels=st.just(torch.tensor([1, 2])), input_ids=st.just(torch.zeros(2, 6).long()))
        bad["guidance_scale"] = st.floats(0, 9)
        return transformer, arguments, bad
    name = dict(text="input_ids", **{"class": "class_labels"})[condition]
    good = torch.tensor([1, 2]) if condition == "class" else torch.tensor([[2, 5, 4, 6, 0, 0], [5, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        prefix = transformer(**{name: good}).prefix_key_values
    # a scale alone is bad as well: the null conditions are missing
    if use == "uniforms":
        bad["guidance_scale"] = bad["guidance_scale"] | st.floats(0, 9)
    arguments[name] = good
    bad[name] = st.one_of(
        tensors_of_another_shape(good),
        tensors_of_another_dtype(good),
        tensors_of_values_outside(good, 0, transformer.null_condition_id),
        anything_but("tensor"),
    )
    bad["prefix_key_values"] = st.just(prefix[:, :, :1])  # one condition too many, and of the wrong size
    bad["class_labels" if condition == "text" else "input_ids"] = st.just(good)
    return transformer, arguments, bad


def bad_prefixes():
    transformer, arguments, _ = bad_transformer_calls("class", "uniforms")
    with torch.no_grad():
        prefix = transformer(class_labels=arguments.pop("class_labels")).prefix_key_values
    bad = st.one_of(
        tensors_of_another_shape(prefix),
        st.sampled_from([torch.int64, torch.bool, torch.complex64]).map(prefix.to),
        anything_but("tensor"),
    )
    return transformer, arguments | dict(prefix_key_values=prefix), dict(prefix_key_values=bad)


TARGETS = {  # the calls to make bad, and how many bad ones are tried
    "pipeline, text": (lambda: bad_pipeline_calls("text"), 350),
    "pipeline, class": (lambda: bad_pipeline_calls("class"), 350),
    "pipeline, unconditional": (lambda: bad_pipeline_calls(None), 250),
    "scheduler": (lambda: bad_scheduler_calls("__init__"), 120),
    "scheduler.set_timesteps": (lambda: bad_scheduler_calls("set_timesteps"), 100),
    "scheduler.set_partitions": (lambda: bad_scheduler_calls("set_partitions"), 150),
    "scheduler.get_step_input": (lambda: bad_scheduler_calls("get_step_input"), 80),
    "scheduler.step": (lambda: bad_scheduler_calls("step"), 120),
    "vae.forward": (lambda: bad_vae_calls("forward"), 80),
    "vae.encode": (lambda: bad_vae_calls("encode"), 80),
    "vae.soft_codes": (lambda: bad_vae_calls("soft_codes"), 100),
    "vae.decode": (lambda: bad_vae_calls("decode"), 100),
    "vae.embed_codes": (lambda: bad_vae_calls("embed_codes"), 80),
    "transformer, text": (lambda: bad_transformer_calls("text", "labels"), 150),
    "transformer, class": (lambda: bad_transformer_calls("class", "uniforms"), 200),
    "transformer, unconditional": (lambda: bad_transformer_calls(None, "uniforms"), 100),
    "transformer, prefix": (bad_prefixes, 60),
}


def test_at_least_2000_bad_calls_are_tried():
    assert sum(examples for _, examples in TARGETS.values()) >= 2000


class AtWork(Exception):
    """A model has begun to compute."""


def forbid_work(*modules: torch.nn.Module) -> None:
    def fail(module, args):
        raise AtWork(f"{type(module).__name__} was run on bad input")

    for module in modules:
        module.register_forward_pre_hook(fail)


def state_of(owner) -> dict:
    """What a refused call may not touch: of modules every tensor, of the rest all that it holds, by identity."""
    state = {}
    for name, component in getattr(owner, "components", {"": owner}).items():
        if isinstance(component, torch.nn.Module):
            for key, tensor in component.state_dict(keep_vars=True).items():
                state[f"{name}.{key}"] = (id(tensor), tensor.dtype, tensor._version)
            state[f"{name}.training"] = component.training
        else:
            state |= {f"{name}.{key}": id(value) for key, value in getattr(component, "__dict__", {}).items()}
    if isinstance(owner, DraftAndRevisePipeline):
        state |= {key: id(value) for key, value in vars(owner).items()}
    return state


@pytest.mark.parametrize("target", TARGETS)
def test_bad_input_is_refused(target):
    make, examples = TARGETS[target]
    function, good, bad = make()
    owner = getattr(function, "__self__", function)
    if isinstance(owner, DraftAndRevisePipeline):
        owner.check_inputs(**good)  # nothing else is wrong
        forbid_work(owner.transformer, owner.vae.decoder)
    elif isinstance(function, torch.nn.Module) or isinstance(owner, torch.nn.Module):
        with torch.no_grad():
            function(**good)
        forbid_work(*(module for module in owner.modules() if not list(module.children())))
    else:
        function(**good)
    before = {} if isinstance(owner, type) else state_of(owner)
    calls = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(st.sets(st.sampled_from(sorted(bad)), min_size=1, max_size=2), st.data())
    def refuse(names, data):
        nonlocal calls
        values = {name: data.draw(bad[name], label=name) for name in sorted(names)}
        calls += 1
        try:
            result = function(**{**good, **values})
        except ValueError as error:
            message = str(error)
        else:
            pytest.fail(f"accepted {names}, returned {type(result).__name__}")
        assert any(re.search(rf"\b{name}\b", message) for name in names), message
        assert re.search(r"\bgot\b|\bmust\b|\bneeds\b|\bnot both\b", message), message
        assert before == ({} if isinstance(owner, type) else state_of(owner)), f"refusing {names} changed the state"

    refuse()
    assert calls >= examples
