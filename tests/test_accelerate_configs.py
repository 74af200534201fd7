"""The configs of examples/accelerate_configs, as accelerate's own launcher reads them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from rq_draft_revise import ContextualRQTransformerModel, RQTransformerModel
from rq_draft_revise.training import configure_deepspeed


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "accelerate_configs"

# file -> processes, machines, precision, how it is launched
EXPECTED = {
    "cpu": (1, 1, "no", None),
    "single_gpu": (1, 1, "bf16", None),
    "multi_gpu": (8, 1, "bf16", "multi_gpu"),
    "multi_node": (16, 2, "bf16", "multi_gpu"),
    "fsdp2": (8, 1, "bf16", "use_fsdp"),
    "deepspeed_zero2": (8, 1, "bf16", "use_deepspeed"),
}


def launched(name: str, *flags: str):
    """The launcher's arguments with such a config file."""
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "examples/train_imagenet.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return args


def test_every_file_is_expected_and_every_expected_file_is_there():
    assert {path.stem for path in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_launches_what_its_name_says(name):
    load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
    num_processes, num_machines, mixed_precision, kind = EXPECTED[name]
    args = launched(name)
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (
        num_processes,
        num_machines,
        mixed_precision,
    )
    kinds = {flag for flag in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, flag)}
    assert kinds == ({kind} if kind else set())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_says_nothing_that_the_launcher_does_not_know(name):
    """It passes over unknown names in the nested parts, and the run is not what it seems."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    nested = [key for part in ("fsdp_config", "deepspeed_config") for key in config.get(part, {})]
    assert set(nested) <= known.keys()


def test_the_cpu_config_asks_for_the_cpu():
    _, environment = prepare_simple_launcher_cmd_env(launched("cpu"))
    assert environment["ACCELERATE_USE_CPU"] == "True"
    _, environment = prepare_simple_launcher_cmd_env(launched("single_gpu"))
    assert environment["ACCELERATE_USE_CPU"] == "False"


def test_fsdp_shards_by_block_and_every_process_saves_its_share(monkeypatch):
    environment = prepare_multi_gpu_env(launched("fsdp2"))
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    wrapped = set(plugin.transformer_cls_names_to_wrap)
    for model in (ContextualRQTransformerModel, RQTransformerModel):
        assert wrapped == set(model._no_split_modules)


def test_the_second_node_is_told_where_the_first_one_is():
    args = launched("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    prepare_multi_gpu_env(args)
    assert (args.node_rank, args.nnodes, args.nproc_per_node) == (1, "2", "8")
    assert args.rdzv_endpoint == "10.0.0.1:29500"


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_deepspeed_is_told_what_the_flags_say_and_keeps_float32(mixed_precision):
    """Its own bf16 would round the averaged weights and the codebook; its float16 autocast has no loss scaler."""
    config = {"bf16": {"enabled": mixed_precision == "bf16"}, "gradient_clipping": "auto"}

    class Told(SimpleNamespace):
        @property
        def mixed_precision(self):  # accelerate reads it from this very configuration
            return "bf16" if config["bf16"]["enabled"] else "fp16" if mixed_precision == "fp16" else "no"

    accelerator = Told(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))
    args = SimpleNamespace(train_batch_size=4, max_grad_norm=0.5)
    if mixed_precision == "fp16":
        with pytest.raises(ValueError, match="--mixed_precision"):
            configure_deepspeed(args, accelerator)
        return
    configure_deepspeed(args, accelerator)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_clipping"]) == (4, 0.5)
    assert config["torch_autocast"]["enabled"] == (mixed_precision == "bf16") and not config["bf16"]["enabled"]


def test_the_deepspeed_config_leaves_to_the_scripts_what_their_flags_say():
    """The launcher would hand them on as they are: 'auto' ended the run, and a number would override the flag."""
    args = launched("deepspeed_zero2")
    assert args.gradient_accumulation_steps is None and args.gradient_clipping is None
