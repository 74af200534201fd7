"""What diffusers expects of a pipeline: attributes, signatures, saving and loading, dtypes, offloading."""

import ast
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from components import (
    CONDITIONS,
    NUM_CLASSES,
    tiny_pipeline,
    tiny_rq_pipeline,
    tiny_rq_transformer,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
)
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

import rq_draft_revise
from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndReviseInpaintPipeline,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerPipeline,
    RQVAEModel,
)


PUBLIC = (
    RQVAEModel,
    ContextualRQTransformerModel,
    DraftAndReviseScheduler,
    DraftAndRevisePipeline,
    DraftAndReviseInpaintPipeline,
)
CALLS = {
    "text": dict(prompt=["a cat", "the owl at night"]),
    "class": dict(class_labels=["class 1", 4]),
    None: dict(num_images_per_prompt=2),
}


def quiet(pipe) -> DraftAndRevisePipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def call(pipe, condition="text", **kwargs):
    """Two images `(2, 3, 8, 8)` of a fixed condition and fixed generators, guided where that is possible."""
    guidance = {} if condition is None else dict(guidance_scale=2.0)
    return pipe(**{**CALLS[condition], **guidance, "generator": generators(), "output_type": "pt", **kwargs}).images


def assert_image(image: torch.Tensor) -> None:
    assert image.shape == (2, 3, 8, 8) and image.isfinite().all()
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.01


@pytest.fixture
def messages(caplog):
    """What diffusers and this package log as a warning or worse."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "rq_draft_revise", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


# Attributes and signatures


def test_attributes_name_every_component():
    pipe = tiny_pipeline("text")
    models = {name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)}
    assert set(pipe.components) == {"vae", "transformer", "scheduler", "tokenizer"}
    assert set(DraftAndRevisePipeline.model_cpu_offload_seq.split("->")) == models
    assert DraftAndRevisePipeline._optional_components == ["tokenizer"]
    assert DraftAndRevisePipeline._callback_tensor_inputs == ["latents"]
    again = DraftAndRevisePipeline(**pipe.components)
    assert all(again.components[name] is component for name, component in pipe.components.items())
    from_pipe = DraftAndRevisePipeline.from_pipe(pipe)
    assert all(from_pipe.components[name] is component for name, component in pipe.components.items())


def test_the_call_has_diffusers_words_with_defaults():
    parameters = inspect.signature(DraftAndRevisePipeline.__call__).parameters
    expected = dict(
        prompt=None,
        num_inference_steps=None,
        guidance_scale=None,
        negative_prompt=None,
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    assert {name: parameters[name].default for name in expected} == expected
    assert list(parameters)[1] == "prompt"
    assert all(p.default is not inspect.Parameter.empty for name, p in parameters.items() if name != "self")
    assert hasattr(DraftAndRevisePipeline.__call__, "__wrapped__")  # torch.no_grad(), and only there:
    assert not hasattr(DraftAndRevisePipeline.encode_condition, "__wrapped__")
    for name in ("guidance_scale", "num_timesteps", "interrupt"):
        assert isinstance(inspect.getattr_static(DraftAndRevisePipeline, name), property)


def test_every_sampling_default_of_the_scheduler_is_an_argument_of_the_call():
    defaults = set(inspect.signature(DraftAndReviseScheduler.__init__).parameters) - {"self"}
    assert defaults <= set(inspect.signature(DraftAndRevisePipeline.__call__).parameters)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_encode_condition_needs_only_the_transformer(condition):
    pipe = tiny_pipeline(condition)
    alone = DraftAndRevisePipeline(
        vae=None, transformer=pipe.transformer, scheduler=None, tokenizer=pipe.tokenizer, id2label=pipe.config.id2label
    )
    if condition is None:
        assert alone.encode_condition(num_images_per_prompt=2) is None
        return
    config = pipe.transformer.config
    heads = (config.num_attention_heads, config.attention_head_dim)
    for num_images, guided in ((1, False), (3, False), (1, True), (3, True)):
        rows = 2 * num_images * (1 + guided)
        condition_kwargs = dict(CALLS[condition], num_images_per_prompt=num_images, do_classifier_free_guidance=guided)
        with torch.no_grad():
            prefix = alone.encode_condition(**condition_kwargs)
        assert prefix.shape == (config.num_spatial_layers, 2, rows, pipe.transformer.prefix_length, *heads)
        if (num_images, guided) == (1, False):  # the defaults
            with torch.no_grad():
                assert torch.equal(alone.encode_condition(**CALLS[condition]), prefix)
        # the images of a condition follow each other, and all null conditions come last
        single = prefix[:, :, ::num_images]
        torch.testing.assert_close(prefix, single.repeat_interleave(num_images, dim=2))
        if guided:
            torch.testing.assert_close(single[:, :, 2], single[:, :, 3])
            assert not torch.allclose(single[:, :, 0], single[:, :, 2])


# Documentation


def documented_arguments(doc: str) -> dict[str, str | None]:
    """Name of each argument in an `Args:` section, with what its parentheses say; `None` where it has none."""
    section = re.search(r"\n *Args:\n(.*?)(?=\n *(?:Returns|Raises):|\Z)", inspect.cleandoc(doc), re.S)
    if section is None:
        return {}
    found = {}
    for entry in re.split(r"\n(?= {4}\S)", section.group(1)):
        entry = " ".join(entry.split())
        head = re.match(r"(.*?\)): ", entry)
        if head is None or not re.match(r"[\w, ]+ \(", entry):
            found |= dict.fromkeys(entry.split(":")[0].split(", "))
            continue
        starts = list(re.finditer(r"(?:^|(?<=, ))((?:\w+, )*\w+) \((?=\[?`)", head.group(1)))
        for start, end in zip(starts, [*(match.start() for match in starts[1:]), None]):
            found |= dict.fromkeys(start.group(1).split(", "), head.group(1)[start.end() : end].rstrip(", )"))
    return found


def documented_callables():
    for cls in PUBLIC:
        yield pytest.param(cls.__doc__, cls.__init__, id=cls.__name__)
        for name, function in vars(cls).items():
            public = inspect.isfunction(function) and (name == "__call__" or not name.startswith("_"))
            if public and "Args:" in (function.__doc__ or ""):
                yield pytest.param(function.__doc__, function, id=f"{cls.__name__}.{name}")


@pytest.mark.parametrize("doc, function", list(documented_callables()))
def test_documented_defaults_are_those_of_the_signature(doc, function):
    documented = documented_arguments(doc)
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    assert list(documented) == list(parameters)
    for name, said in documented.items():
        default = parameters[name].default
        if said is None:  # documented elsewhere
            continue
        stated = re.search(r"defaults to `?(.+?)`?$", said)
        assert ("*optional*" in said) == (default is None), name
        if stated:
            assert ast.literal_eval(stated.group(1)) == default, name
        else:
            assert default in (None, inspect.Parameter.empty) or isinstance(default, tuple), name


def test_the_documentation_test_reads_what_is_there():
    found = documented_arguments(DraftAndRevisePipeline.__call__.__doc__)
    assert found["num_images_per_prompt"] == "`int`, defaults to 1" and found["output_type"].endswith('`"pil"`')
    assert "*optional*" in found["latents"] and "*optional*" in found["top_p"]
    assert documented_arguments(ContextualRQTransformerModel.__doc__)["width"] == "`int`, defaults to 8"
    assert len(list(documented_callables())) >= 15


# Saving and loading


LOAD = """
import sys, torch
from rq_draft_revise import DraftAndRevisePipeline
folder, calls = torch.load(sys.argv[1], weights_only=True)
images = {}
for name, arguments in calls.items():
    pipe = DraftAndRevisePipeline.from_pretrained(f"{folder}/{name}")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images[name] = pipe(**arguments, generator=generators, output_type="pt").images
    images[name + " again"] = torch.tensor([pipe.tokenizer is None, pipe.config.id2label == {0: "a", 1: "b, c"}])
torch.save(images, sys.argv[2])
"""


@pytest.mark.slow
def test_a_fresh_process_in_another_folder_makes_the_same_image(tmp_path):
    expected, calls = {}, {}
    for condition in CONDITIONS:
        pipe = quiet(tiny_pipeline(condition))
        name, calls[name] = str(condition), CALLS[condition]
        if condition == "class":
            pipe = quiet(DraftAndRevisePipeline(**pipe.components, id2label={0: "a", 1: "b, c"}))
            calls[name] = dict(class_labels=["c", 4])
        pipe.save_pretrained(tmp_path / "saved" / name)
        expected[name] = pipe(**calls[name], generator=generators(), output_type="pt").images
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save([str(tmp_path / "saved"), calls], tmp_path / "calls.pt")
    package = Path(rq_draft_revise.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "calls.pt"), str(tmp_path / "images.pt")]
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    for name, image in expected.items():
        torch.testing.assert_close(images[name], image, atol=1e-4, rtol=0)
        assert images[f"{name} again"].tolist() == [name != "text", name == "class"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_saving_and_loading_keeps_everything_and_says_nothing(condition, tmp_path, messages):
    pipe = quiet(tiny_pipeline(condition, scheduler=dict(guidance_scale=1.5) if condition else None))
    expected = call(pipe, condition)
    pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = quiet(DraftAndRevisePipeline.from_pretrained(tmp_path))
    assert messages.text == ""
    assert torch.equal(call(loaded, condition), expected)
    assert (loaded.tokenizer is None) == (condition != "text")
    assert loaded.config.id2label == pipe.config.id2label
    if condition == "class":
        assert loaded.config.id2label == {i: f"class {i}, alias {i}" for i in range(NUM_CLASSES)}
        assert json.loads((tmp_path / "model_index.json").read_text())["id2label"]["1"] == "class 1, alias 1"
    for name in ("vae", "transformer", "scheduler"):
        assert type(loaded.components[name]) is type(pipe.components[name])
        configs = (json.loads(both.components[name].to_json_string()) for both in (loaded, pipe))
        saved, original = ({key: value for key, value in config.items() if key[0] != "_"} for config in configs)
        assert saved == original
    # components that were given are not loaded
    given = DraftAndRevisePipeline.from_pretrained(tmp_path, vae=pipe.vae, scheduler=pipe.scheduler)
    assert given.vae is pipe.vae and given.scheduler is pipe.scheduler


@pytest.mark.parametrize(
    "kind, name, error, message",
    [
        (
            DraftAndRevisePipeline,
            "rq",
            ValueError,
            "got a RQTransformerPipeline: load it by RQTransformerPipeline.from",
        ),
        (
            RQTransformerPipeline,
            "ours",
            ValueError,
            "must be of a RQTransformerPipeline, got a DraftAndRevisePipeline",
        ),
        (DraftAndRevisePipeline, "config", OSError, "config/.* is a configuration without weights.*examples/ train"),
        (RQVAEModel, "config/vae", OSError, "config/vae is a configuration without weights.*RQVAEModel.from_config"),
        (RQVAEModel, "ours", ValueError, "of a RQVAEModel, got a whole pipeline: .*ours/vae"),
        (RQVAEModel, "ours/transformer", ValueError, "of a RQVAEModel, got a ContextualRQTransformerModel"),
    ],
)
def test_a_folder_of_something_else_or_without_weights_is_said_to_be_one(kind, name, error, message, tmp_path):
    tiny_rq_pipeline().save_pretrained(tmp_path / "rq")
    for folder in ("ours", "config"):
        tiny_pipeline().save_pretrained(tmp_path / folder)
    for file in (tmp_path / "config").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(error, match=message):
        kind.from_pretrained(tmp_path / name)


def test_components_that_are_given_make_a_pipeline_of_another_ones_folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert (
        DraftAndReviseInpaintPipeline.from_pretrained(tmp_path).components.keys() == tiny_pipeline().components.keys()
    )
    pipe = RQTransformerPipeline.from_pretrained(tmp_path, transformer=tiny_rq_transformer())
    assert type(pipe.transformer) is type(tiny_rq_transformer())


def test_module_paths_in_model_index_are_file_format(tmp_path):
    tiny_pipeline("text").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: value for name, value in saved.items() if name[0] != "_"} == {
        "id2label": None,
        "scheduler": ["rq_draft_revise.scheduling_draft_and_revise", "DraftAndReviseScheduler"],
        # transformers 5 calls the class TokenizersBackend, which 4.57 does not know
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["rq_draft_revise.contextual_rq_transformer", "ContextualRQTransformerModel"],
        "vae": ["rq_draft_revise.rqvae", "RQVAEModel"],
    }
    assert saved["_class_name"] == "DraftAndRevisePipeline"


def test_a_tokenizer_that_is_replaced_is_recorded_alike():
    pipe = tiny_pipeline("text")
    pipe.tokenizer = tiny_tokenizer()
    assert tuple(pipe.config.tokenizer) == ("transformers", "PreTrainedTokenizerFast")


def test_a_pipeline_loads_without_its_tokenizer_and_says_what_is_missing(tmp_path):
    tiny_pipeline("text").save_pretrained(tmp_path)
    pipe = DraftAndRevisePipeline.from_pretrained(tmp_path, tokenizer=None)
    with pytest.raises(ValueError, match="`prompt` needs a pipeline with a `tokenizer`"):
        pipe("a cat")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    pipe = tiny_pipeline("text", text_vocab_size=8)
    with pytest.raises(ValueError, match=r"`prompt` has token \d\d, but the transformer knows only 8"):
        pipe("a volcano")
    assert_image(call(quiet(pipe), prompt=["a cat", "at a cat"], guidance_scale=1.0))


# Dtypes


def test_a_variant_is_saved_and_loaded(tmp_path):
    pipe = quiet(tiny_pipeline("class"))
    expected = call(pipe, "class")
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    weights = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert weights == ["diffusion_pytorch_model.fp16.safetensors"] * 2
    half = quiet(DraftAndRevisePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16))
    assert half.vae.dtype == half.transformer.dtype == torch.float16
    assert_image(call(half, "class"))
    # read in float32, the weights are those of float16
    full = quiet(DraftAndRevisePipeline.from_pretrained(tmp_path, variant="fp16"))
    torch.testing.assert_close(full.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight.float())
    assert call(full, "class").shape == expected.shape
    with pytest.raises((ValueError, OSError)):
        DraftAndRevisePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_half_precision_draws_finite_images(condition, dtype):
    pipe = quiet(tiny_pipeline(condition)).to(dtype)
    assert pipe.dtype == dtype
    for selection in ("random", "top-c-50%"):
        assert_image(call(pipe, condition, selection=selection))


def test_each_component_loads_in_its_dtype_and_the_codebook_in_float32(tmp_path):
    pipe = quiet(tiny_pipeline("text"))
    pipe.save_pretrained(tmp_path)
    codebook = pipe.vae.quantizer.codebook
    for dtype, vae_dtype, transformer_dtype in (
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ({"transformer": torch.bfloat16, "default": torch.float16}, torch.float16, torch.bfloat16),
        ({"vae": torch.float16}, torch.float16, torch.float32),
    ):
        loaded = quiet(DraftAndRevisePipeline.from_pretrained(tmp_path, dtype=dtype))
        assert (loaded.vae.dtype, loaded.transformer.dtype) == (vae_dtype, transformer_dtype)
        assert torch.equal(loaded.vae.quantizer.codebook, codebook)
        assert_image(call(loaded))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' word of old, which most code still says
        assert DraftAndRevisePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16).dtype == torch.float16


# The codebook


def test_other_codebooks_are_refused():
    vae = tiny_vae()
    arguments = dict(scheduler=DraftAndReviseScheduler(4))
    for other in (tiny_transformer("class", seed=1), tiny_transformer("class", codebook_size=51)):
        with pytest.raises(ValueError, match="`vae` and `transformer` must have the same codebook"):
            DraftAndRevisePipeline(vae=vae, transformer=other, **arguments)
    with pytest.raises(ValueError, match="`vae` and `transformer` must have the same code_depth, got 3 and 2"):
        DraftAndRevisePipeline(vae=vae, transformer=tiny_transformer("class", code_depth=2), **arguments)
    transformer = tiny_transformer("class", vae=vae)
    DraftAndRevisePipeline(vae=vae, transformer=transformer, **arguments)
    for change in (lambda book: book[0, 7].mul_(1.05), lambda book: book[0, 7, 3].neg_(), lambda book: book.zero_()):
        transformer.set_codebook(vae.quantizer.codebook)
        change(transformer.codebook)
        with pytest.raises(ValueError, match="set_codebook"):
            DraftAndRevisePipeline(vae=vae, transformer=transformer, **arguments)


def pipelines():
    """One of each kind, and the arguments of its call."""
    components = tiny_pipeline().components
    editing = dict(image=torch.rand(1, 3, 8, 8), mask_image=torch.ones(1, 1, 8, 8))
    return [
        (DraftAndRevisePipeline(**components), {}),
        (DraftAndReviseInpaintPipeline(**components), editing),
        (tiny_rq_pipeline(), {}),
    ]


def test_a_component_of_another_kind_is_refused_by_name():
    contextual, autoregressive = tiny_transformer(), tiny_rq_transformer()
    scheduler = DraftAndReviseScheduler(4)
    for kind, wrong, rest in (
        (DraftAndRevisePipeline, autoregressive, dict(scheduler=scheduler)),
        (DraftAndReviseInpaintPipeline, autoregressive, dict(scheduler=scheduler)),
        (RQTransformerPipeline, contextual, {}),
    ):
        message = f"`transformer` must be a .* in this pipeline, got a {type(wrong).__name__}"
        with pytest.raises(ValueError, match=message):
            kind(vae=tiny_vae(), transformer=wrong, **rest)
    for pipe, arguments in pipelines()[:2]:
        pipe.scheduler = DDIMScheduler()
        with pytest.raises(ValueError, match="`scheduler` must be a DraftAndReviseScheduler .* got a DDIMScheduler"):
            call(quiet(pipe), **arguments)


def test_callback_classes_of_diffusers_say_themselves_what_they_are_given():
    class Counter(PipelineCallback):
        tensor_inputs, seen = ["latents"], 0

        def callback_fn(self, pipe, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == ["latents"]
            self.seen += 1
            return callback_kwargs

    for pipe, arguments in pipelines():
        counter = Counter()
        for callback in (counter, MultiPipelineCallbacks([counter])):
            call(quiet(pipe), **arguments, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
        assert counter.seen == 2 * pipe.num_timesteps
        with pytest.raises(ValueError, match="must be a list of names among .*'prompt_embeds'"):
            call(pipe, **arguments, callback_on_step_end=SDCFGCutoffCallback())


def test_a_guidance_of_0_says_that_it_passes_over_the_condition(messages):
    for pipe, arguments in pipelines():
        messages.clear()
        call(quiet(pipe), **arguments, guidance_scale=1.0)
        assert not messages.messages
        call(pipe, **arguments, guidance_scale=0.0)
        assert "`guidance_scale` 0 draws from the null condition" in messages.text


def test_a_codebook_that_was_rounded_is_the_same(tmp_path):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for ours in dtypes:
        for theirs in dtypes:
            pipe = tiny_pipeline("class")
            pipe.vae.to(ours)
            pipe.transformer.to(theirs)
            DraftAndRevisePipeline(**pipe.components)
            # and back: the rounding stays
            pipe.to(torch.float32)
            DraftAndRevisePipeline(**pipe.components)
    # loaded in half precision only the transformer's is rounded; saved so, it must load again, in any precision
    tiny_pipeline("class").save_pretrained(tmp_path / "full")
    for dtype in dtypes[1:]:
        DraftAndRevisePipeline.from_pretrained(tmp_path / "full", dtype=dtype).save_pretrained(tmp_path / str(dtype))
        for other in dtypes:
            DraftAndRevisePipeline.from_pretrained(tmp_path / str(dtype), dtype=other)


# Offloading, with the CPU in the part of the accelerator: hooks see every access to a weight, or the call fails


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading_changes_nothing(kind, dtype):
    pipe = quiet(tiny_pipeline("text")).to(dtype)
    expected = call(pipe)
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        # what `enable_sequential_cpu_offload` does, which accepts no bare "cpu": weights are on the meta device except
        # while their own module runs
        for model in (pipe.transformer, pipe.vae):
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        assert pipe.vae.decoder.conv_in.weight.is_meta and pipe.transformer.position_embedding.is_meta
    else:
        pipe.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    for _ in range(2):
        # a group-offloaded decoder stays in float16, others are run in float32
        torch.testing.assert_close(call(pipe), expected, atol=0.01 if dtype == torch.float16 else 1e-6, rtol=0)
    assert pipe.vae.dtype == pipe.transformer.dtype == dtype
    if kind == "sequential":
        assert pipe.vae.decoder.conv_in.weight.is_meta and pipe.transformer.position_embedding.is_meta


def test_after_a_call_every_pipeline_takes_its_models_off_the_device(monkeypatch):
    pipe, baseline = tiny_pipeline(None), tiny_rq_pipeline(None)
    inpaint = DraftAndReviseInpaintPipeline(**pipe.components)
    everything = torch.ones(1, 4, 4, dtype=torch.bool)
    for one, arguments in ((pipe, {}), (baseline, {}), (inpaint, dict(image=torch.zeros(3, 8, 8), mask=everything))):
        freed = []
        monkeypatch.setattr(one, "maybe_free_model_hooks", lambda freed=freed: freed.append(True))
        for output_type in ("pt", "latent"):
            quiet(one)(output_type=output_type, **arguments)
        assert freed == [True, True], type(one).__name__


def test_group_offloading_and_casting_by_layers_go_together():
    pipe = quiet(tiny_pipeline("text"))
    expected = call(pipe)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert pipe.vae.decoder.conv_in.weight.dtype == torch.float16
    torch.testing.assert_close(call(pipe), expected, atol=0.01, rtol=0)
    assert pipe.vae.decoder.conv_in.weight.dtype == torch.float16


def test_diffusers_alone_does_not_find_the_class(tmp_path):
    pipe = quiet(tiny_pipeline("class"))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="DraftAndRevisePipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)  # looks the class up in diffusers; ours loads by its own class
