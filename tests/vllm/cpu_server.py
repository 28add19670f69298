"""A vLLM server on CPU that TRL can train with: all of TRL's server mode but NCCL, which needs GPUs.

TRL sends the weights of each update to the server over NCCL. Here they go through a file: vLLM takes further ways of
weight transfer by name, so the server is told of `FileWeightTransfer`, and TRL's client of `send_by_file`. Everything
else is theirs: the client, its requests, the server and its endpoints.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_entropy.vllm_on_cpu import plain_linear

from . import cpu_engine

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
PLUGIN = "[vllm.general_plugins]\ncpu_server = tests.vllm.cpu_server:plugin\n"


def plugin() -> None:
    """Called by vLLM in each process of the server, where nothing has to be undone."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers import utils

    @dataclass
    class Nothing:
        pass

    @dataclass
    class WeightFile:
        path: str

    class FileWeightTransfer(WeightTransferEngine):
        init_info_cls = Nothing
        update_info_cls = WeightFile

        def init_transfer_engine(self, init_info: Nothing) -> None: ...

        def start_weight_update(self) -> None: ...

        def finish_weight_update(self) -> None: ...

        def shutdown(self) -> None: ...

        def receive_weights(self, update_info: WeightFile) -> None:
            self.model.load_weights(load_file(update_info.path).items())

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # the base class waits for an accelerator, which is not there
            self.receive_weights(self.parse_update_info(update_info))

    utils.dispatch_cpu_unquantized_gemm = plain_linear
    torch.compiler.set_stance("force_eager")
    WeightTransferEngineFactory.register_engine("file", FileWeightTransfer)


def send_by_file(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Let TRL's client hand the weights to the server in a file at `path`."""
    from trl.generation.vllm_client import VLLMClient

    def init_communicator(self: VLLMClient, device: Any = 0) -> None:
        assert self.get_server_info()["weight_transfer_config"]["backend"] == "file"
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})

    def update_named_params(self: VLLMClient, metadata: Any, named_params: Iterator[tuple[str, Tensor]]) -> None:
        save_file({name: value.detach().clone() for name, value in named_params}, path)
        self._start_weight_update()
        self._post(f"{self.base_url}/update_weights", json={"update_info": {"path": str(path)}})
        self._finish_weight_update()

    patch.setattr(VLLMClient, "init_communicator", init_communicator)
    patch.setattr(VLLMClient, "update_named_params", update_named_params)


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


@contextmanager
def serve(model: str, folder: Path) -> Iterator[str]:
    """Run a server of `model` on the loopback address; yields its URL when it answers.

    Args:
        model: Path of the model.
        folder: Empty folder for the server's log and the metadata that announce the plugin.
    """
    metadata = folder / "cpu_server-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu_server\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(PLUGIN)
    port = free_port()
    # what `vllm serve` runs; that command itself wants a distribution of the name vllm
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", LOOPBACK, "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "32"]
    command += ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "file"}']
    environment = {
        **{name: value for name, value in os.environ.items() if name not in cpu_engine.LAUNCHER_VARIABLES},
        **cpu_engine.VLLM_SETTINGS,
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
    }
    with (folder / "server.log").open("w+") as log:
        server = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://{LOOPBACK}:{port}"
            if not answers(url, server):
                log.seek(0)
                pytest.fail(f"The vLLM server did not start:\n{log.read()[-4000:]}")
            yield url
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def answers(url: str, server: subprocess.Popen[bytes], timeout: float = 480.0) -> bool:
    """Whether the server is ready to answer within `timeout` seconds."""
    end = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=10):
            return True
        time.sleep(0.5)
    return False
