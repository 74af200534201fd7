"""What diffusers expects of a model, checked on both of ours as its own model testers do.

Offloading needs no accelerator to be tested: weights go to the disk or to the meta device, so that one that is read
outside of its module's forward is missing or NaN.
"""

import inspect
import json
import re

import accelerate
import diffusers.models.modeling_utils
import pytest
import torch
from accelerate.utils import compute_module_sizes
from components import (
    random_codes,
    random_condition,
    random_pixels,
    seeded,
    tiny_pipeline,
    tiny_rq_transformer,
    tiny_transformer,
    tiny_vae,
)
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch._dynamo.utils import counters

import rq_draft_revise.attention
from rq_draft_revise import ContextualRQTransformerModel, RQTransformerModel, RQVAEModel
from rq_draft_revise.attention import SelfAttentionProcessor


def step_inputs(model, batch_size: int = 2, size: int = 5, guided: bool = False, seed: int = 0) -> dict:
    """What a pipeline asks of the transformer in one step: all of it tensors, no shape found out from values."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(batch_size, 16, generator=generator).argsort(dim=-1)[:, :size]
    codes = random_codes(model, batch_size, seed).flatten(1, 2)
    codes = codes.scatter(1, positions.unsqueeze(-1).expand(-1, -1, codes.shape[-1]), model.mask_token_id)
    inputs = {
        "codes": codes.unflatten(1, (4, 4)),
        "positions": positions,
        "uniforms": torch.rand(batch_size, size, codes.shape[-1], generator=generator),
        "temperature": torch.tensor(0.8),
    }
    condition = random_condition(model, batch_size, seed)
    if guided:
        inputs["guidance_scale"] = torch.tensor(2.0)
        condition = {
            name: torch.cat([value, torch.full_like(value, model.null_condition_id)])
            for name, value in condition.items()
        }
    if condition:
        with torch.no_grad():
            inputs["prefix_key_values"] = model(**condition).prefix_key_values
    return inputs


def teacher_inputs(model) -> dict:
    labels = random_codes(model)
    codes = labels.clone()
    codes[:, 1:3] = model.mask_token_id
    return {"codes": codes, "labels": labels, **random_condition(model)}


def sampling_inputs(model) -> dict:
    inputs = {name: value for name, value in teacher_inputs(model).items() if name != "labels"}
    return {**inputs, "uniforms": torch.rand(2, 8, 3, generator=torch.Generator().manual_seed(0))}


class Case:
    """A model, and calls of it that together read every weight; `smooth` is an output that no code's jump is in."""

    def __init__(self, make, cls, calls, smooth):
        self.make, self.cls, self.calls, self.smooth = make, cls, calls, smooth

    def run(self, model) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            outputs = {name: call(model) for name, call in self.calls.items()}
        return {f"{name}.{i}": value for name, output in outputs.items() for i, value in enumerate(output)}


def of_pixels(method: str):
    return lambda model: getattr(model, method)(random_pixels().to(model.dtype), return_dict=False)


VAE_CALLS = {
    "__call__": of_pixels("__call__"),  # and not "forward", for hooks sit on the call
    "encode": of_pixels("encode"),
    "soft_codes": of_pixels("soft_codes"),
    "decode": lambda model: model.decode(random_codes(model), return_dict=False),
    "embed_codes": lambda model: (model.embed_codes(random_codes(model), depth=2),),
}

TRANSFORMER_CALLS = {
    "teacher forcing": lambda model: [x for x in model(**teacher_inputs(model), return_dict=False) if x is not None],
    "sampling": lambda model: model(**sampling_inputs(model), return_dict=False),
    "prefix": lambda model: model(**random_condition(model), return_dict=False),
}


def sample_two_stacks(model) -> list[torch.Tensor]:
    """Of the baseline: log-probabilities, stacks and the cache of two steps."""
    codes, condition, outputs = random_codes(model), random_condition(model), []
    cache = model(**condition).past_key_values
    for n in range(2):
        uniforms = torch.rand(2, 3, generator=torch.Generator().manual_seed(n))
        step = dict(codes=codes, position=torch.tensor([n]), uniforms=uniforms, past_key_values=cache)
        outputs += model(**step, **condition, return_dict=False)[:2]
    return [*outputs, cache]


RQ_TRANSFORMER_CALLS = {
    "teacher forcing": lambda model: model(labels=random_codes(model), **random_condition(model), return_dict=False),
    "sampling": sample_two_stacks,
    "cache": lambda model: model(**random_condition(model), return_dict=False),
}

CASES = {
    "rqvae": Case(tiny_vae, RQVAEModel, VAE_CALLS, smooth="decode.0"),
    "transformer": Case(
        lambda: tiny_transformer("text"), ContextualRQTransformerModel, TRANSFORMER_CALLS, smooth="teacher forcing.0"
    ),
    "baseline": Case(
        lambda: tiny_rq_transformer("text"), RQTransformerModel, RQ_TRANSFORMER_CALLS, smooth="teacher forcing.0"
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def assert_equal(ours: dict, reference: dict, atol: float = 1e-5) -> None:
    assert ours.keys() == reference.keys()
    for name in reference:
        difference = (ours[name].double() - reference[name].double()).abs().max()
        assert difference <= atol, f"{name} differs by {float(difference)}"


# ---- before training


@pytest.mark.parametrize("cls", [ContextualRQTransformerModel, RQTransformerModel])
@pytest.mark.parametrize("condition", [dict(num_classes=40), dict(text_vocab_size=40, max_text_length=12)])
def test_weights_begin_small_and_biases_at_zero(cls, condition):
    """At a standard deviation of 0.02, whatever their shape, so that all codes begin with the same probability."""
    sizes = dict(codebook_size=50, codebook_dim=300, num_spatial_layers=2, num_depth_layers=2, num_attention_heads=4)
    with seeded(0):
        model = cls(attention_head_dim=16, **sizes, **condition)
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            assert not parameter.any(), name
        elif module in norms:
            assert (parameter == 1).all(), name
        else:
            ratio = parameter.detach().double().square().mean().sqrt() / 0.02
            assert abs(ratio - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


# ---- forward


def test_forward_draws_nothing_and_training_mode_changes_nothing_without_dropout(case):
    model = case.make()
    state = torch.get_rng_state()
    reference = case.run(model)
    assert_equal(case.run(model), reference, atol=0)
    assert_equal(case.run(model.train()), reference)
    assert torch.equal(torch.get_rng_state(), state)


def test_tuples_are_the_outputs_in_order_with_a_differentiable_tensor_first():
    vae, transformer = tiny_vae(), tiny_transformer("text")
    calls = [
        (vae, {"pixel_values": random_pixels()}),
        (transformer, teacher_inputs(transformer)),
        (transformer, sampling_inputs(transformer)),
        (transformer, random_condition(transformer)),
        (tiny_transformer("class"), teacher_inputs(tiny_transformer("class"))),
    ]
    for model, inputs in calls:
        as_tuple, as_dict = model(**inputs, return_dict=False), model(**inputs)
        assert isinstance(as_tuple, tuple) and as_tuple[0].is_floating_point() and as_tuple[0].requires_grad
        values = [value for value in as_tuple if value is not None]
        assert len(values) == len(as_dict.to_tuple())
        assert all(torch.equal(a, b) for a, b in zip(values, as_dict.to_tuple(), strict=True))
    codes = random_codes(vae)
    for method, argument in ((vae.encode, random_pixels()), (vae.soft_codes, random_pixels()), (vae.decode, codes)):
        for a, b in zip(method(argument, return_dict=False), method(argument).to_tuple(), strict=False):
            assert torch.equal(a, b)


# ---- config


def test_every_argument_is_in_the_config_which_survives_json(case):
    model = case.make()
    arguments = set(inspect.signature(case.cls.__init__).parameters) - {"self"}
    saved = json.loads(model.to_json_string())
    assert arguments <= set(model.config) and arguments <= set(saved)
    with seeded(7):
        copy = case.cls.from_config(saved)
    assert json.loads(copy.to_json_string()) == saved
    copy.load_state_dict(model.state_dict())
    assert_equal(case.run(copy.eval()), case.run(model))


@pytest.mark.parametrize(
    "function",
    [
        RQVAEModel,
        RQVAEModel.soft_codes,
        RQVAEModel.encode,
        RQVAEModel.decode,
        ContextualRQTransformerModel,
        ContextualRQTransformerModel.forward,
    ],
    ids=lambda function: function.__qualname__,
)
def test_documented_defaults_are_those_of_the_signature(function):
    if function.__qualname__.startswith("apply_forward_hook"):
        pytest.skip("diffusers 0.40 puts a wrapper without docstring in the place of the method")
    parameters = inspect.signature(function).parameters
    documented = re.findall(r"(\w+) \(`[^`]+`(?: of [^)]*)?, defaults to `?([^`)]+?)`?\)", function.__doc__)
    assert documented
    for name, default in documented:
        assert parameters[name].default == eval(default), name
    for name in re.findall(r"(\w+) \(`[^`]+`[^)]*, \*optional\*\)", function.__doc__):
        assert parameters[name].default is None, name


def test_module_paths_are_frozen():
    """`model_index.json` records them: another path is another file format."""
    pipe = tiny_pipeline("text")
    paths = [type(component).__module__ for component in (pipe, pipe.vae, pipe.transformer, pipe.scheduler)]
    assert paths == [
        "rq_draft_revise.pipeline_draft_and_revise",
        "rq_draft_revise.rqvae",
        "rq_draft_revise.contextual_rq_transformer",
        "rq_draft_revise.scheduling_draft_and_revise",
    ]


RESNET = ["conv1", "conv2", "norm1", "norm2"]
ATTENTION = ["group_norm", "to_k", "to_out.#", "to_q", "to_v"]
BLOCK = ["attn.to_k", "attn.to_out.#", "attn.to_q", "attn.to_v", "ff.net.#", "ff.net.#.proj", "norm1", "norm2"]
OF_RQVAE = [
    *[f"decoder.{name}" for name in ("conv_in", "conv_norm_out", "conv_out")],
    *[f"decoder.mid_block.attentions.#.{name}" for name in ATTENTION],
    *[f"decoder.mid_block.resnets.#.{name}" for name in RESNET],
    *[f"decoder.up_blocks.#.attentions.#.{name}" for name in ATTENTION],
    *[f"decoder.up_blocks.#.resnets.#.{name}" for name in [*RESNET, "conv_shortcut"]],
    "decoder.up_blocks.#.upsamplers.#.conv",
    *[f"encoder.{name}" for name in ("conv_in", "conv_norm_out", "conv_out")],
    *[f"encoder.down_blocks.#.attentions.#.{name}" for name in ATTENTION],
    "encoder.down_blocks.#.downsamplers.#.conv",
    *[f"encoder.down_blocks.#.resnets.#.{name}" for name in [*RESNET, "conv_shortcut"]],
    *[f"encoder.mid_block.attentions.#.{name}" for name in ATTENTION],
    *[f"encoder.mid_block.resnets.#.{name}" for name in RESNET],
    "post_quant_conv",
    "quant_conv",
    *[f"quantizer.{name}" for name in ("codebook", "ema_counts", "ema_sums")],
]
OF_TRANSFORMER = [
    *[f"blocks.#.{name}" for name in BLOCK],
    "depth_transformer.codebook.vectors",
    *[f"depth_transformer.blocks.#.{name}" for name in BLOCK],
    *[f"depth_transformer.{name}" for name in ("head", "norm_out", "position_embedding")],
    "input_projection",
    "mask_embedding",
    "position_embedding",
]
OF_CONDITION = ["condition_embedding", "prefix_position_embedding"]


@pytest.mark.parametrize(
    "model, expected",
    [
        (tiny_vae, OF_RQVAE),
        (lambda: tiny_transformer(None, code_depth=1), OF_TRANSFORMER),
        (lambda: tiny_transformer(None), [*OF_TRANSFORMER, "depth_transformer.input_projection"]),
        (lambda: tiny_transformer("class", code_depth=1), OF_TRANSFORMER + OF_CONDITION),
        (
            lambda: tiny_transformer("text", code_depth=1),
            OF_TRANSFORMER + OF_CONDITION + ["text_head", "text_norm_out"],
        ),
    ],
    ids=["rqvae", "VQ", "unconditional", "class", "text"],
)
def test_names_of_the_weights_are_frozen(model, expected):
    """`#` is any number; a name stands for its weight and its bias."""
    names = {re.sub(r"\.\d+(?=\.)", ".#", name) for name in model().state_dict()}
    stems = {re.sub(r"\.(weight|bias)$", "", name) for name in names}
    assert sorted(stems) == sorted(expected)
    assert {f"{name}.weight" for name in stems} & names == {name for name in names if name.endswith(".weight")}


# ---- saving and loading


def state_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_saved_model_loads_as_it_was(case, tmp_path, low_cpu_mem_usage):
    """`low_cpu_mem_usage` builds the model on the meta device; without, `_keep_in_fp32_modules` rules that out."""
    model = case.make()
    model.save_pretrained(tmp_path)
    if not low_cpu_mem_usage and case.cls._keep_in_fp32_modules is not None:
        low_cpu_mem_usage = None
    arguments = {} if low_cpu_mem_usage is None else {"low_cpu_mem_usage": low_cpu_mem_usage}
    loaded, info = case.cls.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert not any(info.values()) and not loaded.training
    assert state_equal(loaded, model)
    assert_equal(case.run(loaded), case.run(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_variant_is_found_by_its_name_alone(case, tmp_path):
    model = case.make()
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert state_equal(case.cls.from_pretrained(tmp_path, variant="fp16"), model)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        case.cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_load_as_the_whole(case, tmp_path, monkeypatch, variant, parallel):
    model = case.make()
    size = compute_module_sizes(model)[""]
    model.save_pretrained(tmp_path, max_shard_size=f"{int(0.4 * size) // 1000}KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) >= 3
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_ENABLE_PARALLEL_LOADING", parallel)
    assert state_equal(case.cls.from_pretrained(tmp_path, variant=variant), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_saves_loads_and_runs(case, tmp_path, dtype):
    model = case.make()
    model.save_pretrained(tmp_path / "float32")
    half = case.cls.from_pretrained(tmp_path / "float32", torch_dtype=dtype)
    assert half.dtype == dtype and {parameter.dtype for parameter in half.parameters()} == {dtype}
    kept = torch.float32 if case.cls._keep_in_fp32_modules else dtype
    assert {buffer.dtype for buffer in half.buffers()} == {kept}
    outputs = case.run(half)
    assert all(value.isfinite().all() for value in outputs.values())
    half.save_pretrained(tmp_path / "half")
    again = case.cls.from_pretrained(tmp_path / "half", torch_dtype=dtype)
    assert state_equal(again, half)


def test_nothing_is_saved_twice(case):
    tensors = case.make().state_dict()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


def test_moving_averages_of_the_weights_save_and_load(case, tmp_path):
    model = case.make()
    average = EMAModel(model.parameters(), decay=0.5, min_decay=0.5, model_cls=case.cls, model_config=model.config)
    average.step(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path)
    for parameter, old in zip(loaded.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old + 0.5)


# ---- memory


@torch.no_grad()
def poison(model) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(torch.nan)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_sees_every_access_to_a_weight(case, tmp_path, offload_type):
    model = case.make()
    reference = case.run(model)
    model.enable_group_offload(
        torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors"))
    for name, call in case.calls.items():
        poison(model)  # what is in memory now was to be offloaded
        with torch.no_grad():
            outputs = call(model)
        assert_equal(
            {f"{name}.{i}": value for i, value in enumerate(outputs)},
            {key: value for key, value in reference.items() if key.startswith(f"{name}.")},
        )


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_goes_with_layerwise_casting(case, offload_type):
    model = case.make()
    reference = case.run(model)
    model.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(case.run(model)[case.smooth], reference[case.smooth], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_sequential_offloading_sees_every_access_to_a_weight(case, offload_buffers):
    model = case.make()
    reference = case.run(model)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta == offload_buffers for buffer in model.buffers())
    assert_equal(case.run(model), reference)


def test_a_device_map_may_put_part_of_the_model_on_the_disk(case, tmp_path):
    """The codebook is a buffer and stays in memory: of what is on the disk, accelerate fetches parameters alone."""
    model = case.make()
    model.save_pretrained(tmp_path)
    on_disk = ("decoder", "quant_conv", "blocks", "depth_transformer.blocks", "depth_transformer.head", "text_head")
    device_map = {}
    for name in model.state_dict():
        depth = 2 if name.startswith("depth_transformer") else 1
        part = ".".join(name.split(".")[:depth])
        device_map[part] = "disk" if part in on_disk else "cpu"
    split = case.cls.from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path))
    assert {parameter.is_meta for parameter in split.parameters()} == {True, False}
    assert_equal(case.run(split), case.run(model))


def test_float8_layerwise_casting_runs_and_spares_what_must_be_precise(case):
    model = case.make().to(torch.bfloat16)
    reference = case.run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    stored = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    small = {name for name, dtype in stored.items() if dtype == torch.float8_e4m3fn}
    assert sum(dict(model.named_parameters())[name].numel() for name in small) > 0.7 * model.num_parameters()
    assert not any(word in name for name in small for word in ("norm", "codebook", "quantizer", "embedding"))
    outputs = {name: value.float() for name, value in case.run(model).items()}
    assert all(value.isfinite().all() for value in outputs.values())
    error = (outputs[case.smooth] - reference[case.smooth]).std() / reference[case.smooth].float().std()
    assert 0 < error < 0.5


def test_class_lists_name_classes_that_the_model_has(case):
    names = {type(module).__name__ for module in case.make().modules()}
    assert case.cls._no_split_modules and set(case.cls._no_split_modules) <= names
    assert set(case.cls._repeated_blocks) <= names
    assert set(case.cls._keep_in_fp32_modules or []) <= {name for name, _ in case.make().named_modules()}


# ---- attention


def test_attention_processors_are_got_and_set():
    model = tiny_transformer("text")
    processors = model.attn_processors
    assert sorted(processors) == [
        "blocks.0.attn.processor",
        "blocks.1.attn.processor",
        "depth_transformer.blocks.0.attn.processor",
        "depth_transformer.blocks.1.attn.processor",
    ]
    assert all(
        isinstance(module, AttentionModuleMixin) for name, module in model.named_modules() if name.endswith("attn")
    )
    fresh = {name: SelfAttentionProcessor() for name in processors}
    model.set_attn_processor(dict(fresh))
    assert all(model.attn_processors[name] is processor for name, processor in fresh.items())
    one = SelfAttentionProcessor()
    model.set_attn_processor(one)
    assert all(processor is one for processor in model.attn_processors.values())
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"blocks.0.attn.processor": one})


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_agree(backend, monkeypatch):
    # `set_attention_backend` changes the default of all models, too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    case, model = CASES["transformer"], tiny_transformer("text")
    reference = case.run(model)
    used = []
    dispatch = rq_draft_revise.attention.dispatch_attention_fn

    def record(*args, **kwargs):
        assert kwargs.get("attn_mask") is None, "no mask is ever materialised"
        used.append(kwargs["backend"])
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(rq_draft_revise.attention, "dispatch_attention_fn", record)
    model.set_attention_backend(backend)
    by_method = case.run(model)
    assert set(used) == {AttentionBackendName(backend)}
    model.reset_attention_backend()
    used.clear()
    with attention_backend(backend):
        by_context = case.run(model)
    assert set(used) == {None}
    assert_equal(by_method, reference)
    assert_equal(by_context, by_method, atol=0)


def test_fused_projections_change_nothing():
    case, model = CASES["transformer"], tiny_transformer("text")
    reference, names = case.run(model), set(model.state_dict())
    model.fuse_qkv_projections()
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    assert len(attentions) == 4 and all(attention.fused_projections for attention in attentions)
    assert_equal(case.run(model), reference)
    model.unfuse_qkv_projections()
    assert not any(attention.fused_projections for attention in attentions) and set(model.state_dict()) == names
    assert_equal(case.run(model), reference, atol=0)


# ---- adapters


def test_an_adapter_is_trained_saved_and_loaded(tmp_path):
    case, model = CASES["transformer"], tiny_transformer("text")
    reference = case.run(model)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4 * 4 * 2  # attentions, projections, A and B
    assert_equal(case.run(model), reference)  # B starts at zero

    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**teacher_inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)

    adapted = case.run(model)
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert_equal(case.run(model), reference, atol=0)
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_equal(case.run(model), adapted)
    assert not torch.allclose(adapted["teacher forcing.0"], reference["teacher forcing.0"], atol=1e-3)


# ---- compilation


@pytest.mark.parametrize("condition, guided", [("class", False), ("text", True), (None, False)])
def test_a_sampling_step_is_one_graph_whatever_the_scalars(fresh_compiler, condition, guided):
    model = tiny_transformer(condition)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed, (temperature, scale) in enumerate([(0.8, 2.0), (0.5, 3.0)]):
            inputs = step_inputs(model, guided=guided, seed=seed)
            inputs["temperature"] = torch.tensor(temperature)
            if guided:
                inputs["guidance_scale"] = torch.tensor(scale)
            ours, reference = compiled(**inputs), model(**inputs)
            assert torch.equal(ours.stacks, reference.stacks)
            torch.testing.assert_close(ours.log_probs, reference.log_probs, rtol=0, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_serves_all_batches_and_block_sizes(fresh_compiler):
    model = tiny_transformer("class")
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),  # equal sizes are chance, as in diffusers' own test
    ):
        for batch_size, size in ((2, 5), (3, 7), (6, 4)):
            inputs = step_inputs(model, batch_size, size)
            assert torch.equal(compiled(**inputs).stacks, model(**inputs).stacks)


@pytest.mark.parametrize("code_depth", [3, 6])
def test_repeated_blocks_compile_once_each(fresh_compiler, code_depth):
    """Dynamo counts by function. Sampling needs three graphs of a depth block, at any depth: for a stack's first code
    without a past, for the second with one of length 1, and for all others with one of any length."""
    reference = tiny_transformer("class", code_depth=code_depth)
    model = tiny_transformer("class", code_depth=code_depth)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    inputs = step_inputs(reference)
    teacher = {name: inputs[name] for name in ("codes", "positions", "prefix_key_values")}
    teacher["labels"] = random_codes(model)
    with torch.no_grad(), torch.fx.experimental._config.patch(use_duck_shape=False):  # as above
        with torch._dynamo.config.patch(recompile_limit=1):
            torch.testing.assert_close(model(**teacher).logits, reference(**teacher).logits)
        assert counters["stats"]["unique_graphs"] == 2  # a spatial and a depth block
        torch.compiler.reset()
        with torch._dynamo.config.patch(recompile_limit=3):
            assert torch.equal(model(**inputs).stacks, reference(**inputs).stacks)


@pytest.mark.slow
def test_inductor_samples_what_eager_samples(fresh_compiler):
    model = tiny_transformer("class", code_depth=2, num_spatial_layers=1, num_depth_layers=1)
    inputs = step_inputs(model, guided=True)
    with torch.no_grad():
        ours, reference = torch.compile(model, fullgraph=True)(**inputs), model(**inputs)
    assert torch.equal(ours.stacks, reference.stacks)
    torch.testing.assert_close(ours.log_probs, reference.log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_a_sampling_step_is_exportable(fresh_compiler, guided):
    model = tiny_transformer("class")
    exported = torch.export.export(model, (), step_inputs(model, guided=guided))
    inputs = step_inputs(model, guided=guided, seed=1)
    inputs["temperature"] = torch.tensor(0.4)
    with torch.no_grad():
        ours, reference = exported.module()(**inputs), model(**inputs)
    assert torch.equal(ours.stacks, reference.stacks)
    torch.testing.assert_close(ours.log_probs, reference.log_probs, rtol=0, atol=1e-4)


def test_the_rqvae_compiles_as_one_graph_and_is_exportable(fresh_compiler):
    vae, pixels = tiny_vae(), random_pixels(seed=1)
    with torch.no_grad():
        reference = vae(pixels)
        compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")(pixels)
        exported = torch.export.export(vae, (random_pixels(),)).module()(pixels)
        decoded = torch.compile(vae.decode, fullgraph=True, backend="aot_eager")(reference.codes)
    for output in (compiled, exported):
        assert torch.equal(output.codes, reference.codes)
        torch.testing.assert_close(output.sample, reference.sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.sample, reference.sample, rtol=0, atol=1e-5)
