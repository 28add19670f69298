"""The configurations of `recipes/accelerate`, read by accelerate itself, and the commands in their headers."""

import argparse
import ipaddress
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import _filter_args, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed import run as torchrun
from trl.scripts.vllm_serve import make_parser

from trl_entropy.commands import train

from .conftest import ROOT

FOLDER = ROOT / "recipes" / "accelerate"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """accelerate fills the environment for the processes that it is about to launch; give it back as it was."""
    with patch.dict(os.environ):
        yield


KINDS = {
    "one-gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed-zero2": DistributedType.DEEPSPEED,
    "deepspeed-zero3": DistributedType.DEEPSPEED,
    "multi-node": DistributedType.FSDP,
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers name files from the checkout's root; and accelerate looks whether the port is free."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)


def commands(name: str) -> list[list[str]]:
    """The commands in a header, as a shell would split them."""
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    lines = re.sub(r"\\\n#\s+", "", header).splitlines()
    indented = (line.removeprefix("#   ") for line in lines if line.startswith("#   "))
    return [shlex.split(line) for line in indented]


def launch_arguments(name: str, *more: str) -> argparse.Namespace:
    """What `accelerate launch` makes of the header's command."""
    (command,) = (line for line in commands(name) if line[:2] == ["accelerate", "launch"])
    assert command[2:4] == ["--config_file", f"recipes/accelerate/{name}.yaml"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*more, *command[2:]]))
    return arguments


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses unknown keys
    assert config.distributed_type == KINDS[name]
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu
    assert config.num_machines == (2 if name == "multi-node" else 1)
    assert config.num_processes == {"one-gpu": 1, "multi-node": 16}.get(name, 8)


@pytest.mark.parametrize("name", KINDS)
def test_the_headers_command_trains_a_recipe_on_its_schedule(name: str, tmp_path: Path) -> None:
    """The global batch is the same on any number of processes: 8 optimizer steps a rollout."""
    arguments = launch_arguments(name)
    assert arguments.module
    assert arguments.training_script == "trl_entropy.commands.train"
    _, config, model, _ = train.parse(
        [*arguments.training_script_args, "--use_cpu", "true", "--output_dir", str(tmp_path)]
    )
    per_step = arguments.num_processes * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert per_step == 128
    assert config.steps_per_generation == 8 * config.gradient_accumulation_steps
    assert not (config.fsdp and name.startswith("deepspeed"))
    assert model.use_peft == (name in ("one-gpu", "ddp"))


def torch_launch(arguments: argparse.Namespace) -> Any:
    """How torchrun would start the processes."""
    script = ["--training_script", arguments.training_script, "--training_script_args", "x"]
    config, _, _ = torchrun.config_from_args(_filter_args(arguments, torchrun.get_args_parser(), script))
    return config


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "multi-node"])
def test_where_the_processes_meet(name: str) -> None:
    arguments = launch_arguments(name)
    prepare_multi_gpu_env(arguments)
    config = torch_launch(arguments)
    assert config.nproc_per_node == 8 if name != "ddp" else 2
    assert config.rdzv_endpoint == ("10.0.0.1:29500" if name == "multi-node" else "127.0.0.1:29500")
    assert config.min_nodes == config.max_nodes == (2 if name == "multi-node" else 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_machine_rank_of_the_command_line_counts(rank: int) -> None:
    (command,) = (line for line in commands("multi-node") if line[0] == "accelerate")
    command[command.index("--machine_rank") + 1] = str(rank)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[2:]))
    prepare_multi_gpu_env(arguments)
    assert torch_launch(arguments).rdzv_configs["rank"] == rank


@pytest.mark.parametrize("name", ["fsdp2", "multi-node"])
def test_fsdp2_shards_after_each_layer_and_saves_whole_weights(name: str) -> None:
    environment = {key: value for key, value in prepare_multi_gpu_env(launch_arguments(name)).items() if "FSDP" in key}
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize(("name", "stage"), [("deepspeed-zero2", "2"), ("deepspeed-zero3", "3")])
def test_deepspeeds_stage(name: str, stage: str) -> None:
    arguments = launch_arguments(name)
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(stage == "3").lower()
    assert environment["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "none"
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL") == ("true" if stage == "3" else None)


def test_the_vllm_server_binds_to_a_stated_address() -> None:
    (command,) = (line for line in commands("multi-node") if line[0] == "trl")
    assert command[1] == "vllm-serve"
    (server,) = make_parser().parse_args_and_config(command[2:])
    assert ipaddress.ip_address(server.host).is_private
    assert server.host not in ("0.0.0.0", "::")
    assert not server.trust_remote_code
    arguments = launch_arguments("multi-node").training_script_args
    _, config, model, _ = train.parse([*arguments, "--use_cpu", "true", "--output_dir", "unused"])
    assert config.vllm_server_base_url == f"http://{server.host}:{server.port}"
    assert config.vllm_mode == "server"
    assert server.model == model.model_name_or_path
    assert server.max_model_len == config.vllm_max_model_length


def test_only_the_multi_node_server_is_on_the_network() -> None:
    """Everywhere else, an address is the loopback one."""
    for path in FOLDER.glob("*.yaml"):
        addresses = set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", path.read_text(encoding="utf-8")))
        private = {"10.0.0.1", "10.0.0.2", "10.0.0.3"} if path.stem == "multi-node" else set()
        assert addresses <= {"127.0.0.1"} | private, path
