"""What TRL's asynchronous trainer needs beside the server of `cpu_server`: its hand-over of weights, and a reward."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.conftest import ASCII, character_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1.0 where the first token is odd, else 0.0; in a module of its own, as the process of the rollouts imports it.

    Of the tokens: without any marks, the text that TRL reads from an answer begins with the prompt.
    """
    return [float(ids[0] % 2) for ids in completion_ids]


def conversational_tokenizer() -> PreTrainedTokenizerFast:
    """Character-level, with a template without any marks, and TRL's way of reading answers."""
    from trl.chat_template_utils import qwen3_template

    tokenizer = character_tokenizer(ASCII)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = qwen3_template
    return tokenizer


class FileTransfer:
    """TRL's protocol of weight transfer, over a file instead of NCCL; the requests are TRL's.

    Args:
        url: Of the server.
        path: The file.
    """

    def __init__(self, url: str, path: Path) -> None:
        from trl.experimental.async_grpo.vllm_client import VLLMClient

        self._client, self._path = VLLMClient(url), path

    def init_weight_transfer(self) -> None:
        self._client.wait_for_server_ready()
        self._client.init_weight_transfer_engine({})

    def pause(self) -> None:
        self._client.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        save_file({name: value.detach().clone() for name, value in iterator}, self._path)
        self._client.start_weight_update()
        self._client.update_weights({"path": str(self._path)})
        self._client.finish_weight_update()

    def resume(self) -> None:
        self._client.resume()

    def destroy(self) -> None: ...
