"""`trl-entropy recipes`, and what no shipped recipe may do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_entropy.commands.recipes import copy, describe, main
from trl_entropy.recipes import recipe_names, recipe_path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def test_listing_has_every_recipe_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 2 for line in lines)
    name = "erc-r1-distill-qwen-1.5b"
    assert describe(name) in next(line for line in lines if line.split()[0] == name)
    assert describe(name).startswith("ERC on DAPO")


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "erc-r1-distill-qwen-1.5b"])
    assert capsys.readouterr().out == recipe_path("erc-r1-distill-qwen-1.5b").read_text(encoding="utf-8")


def test_copy_writes_a_file_and_overwrites_only_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "erc-r1-distill-qwen-1.5b"
    original = recipe_path(name).read_bytes()
    main(["copy", name])
    target = tmp_path / f"{name}.yaml"
    assert target.read_bytes() == original
    target.write_text("mine")
    with pytest.raises(SystemExit, match=r"exists.*--force"):
        main(["copy", name])
    assert target.read_text() == "mine"
    main(["copy", name, "--force"])
    assert target.read_bytes() == original
    (tmp_path / "folder").mkdir()
    assert copy(name, "folder") == Path("folder", f"{name}.yaml")
    assert copy(name, "new/folder/mine.yaml").read_bytes() == original


@pytest.mark.parametrize("action", ["show", "copy"])
def test_unknown_recipe_is_one_line_that_lists_the_others(action: str) -> None:
    with pytest.raises(SystemExit, match=r"no recipe 'nope'.*erc-r1-distill-qwen-1\.5b"):
        main([action, "nope"])


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_runs_downloaded_code_or_opens_a_server_to_the_network(name: str) -> None:
    """TRL's `vllm_server_host` defaults to 0.0.0.0, every interface: server mode must name the loopback address."""
    text = recipe_path(name).read_text(encoding="utf-8")
    found = unsafe_settings(yaml.safe_load(text))
    if "multi-node" in text.partition("\n")[0]:  # its server is on another machine, as its first line says
        found = [setting for setting in found if not setting.startswith("vllm_server")]
    assert found == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"use_vllm": True, "vllm_mode": "server"},
        {"vllm_mode": "server", "vllm_server_host": "0.0.0.0"},
        {"vllm_server_base_url": "http://10.0.0.7:8000"},
        {"trust_remote_code": True},
        {"model_init_kwargs": {"trust_remote_code": "yes"}},
    ],
)
def test_unsafe_settings_are_found(recipe: dict[str, Any]) -> None:
    assert unsafe_settings(recipe)
    assert not unsafe_settings({"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "trust_remote_code": False})


def unsafe_settings(recipe: Any) -> list[str]:
    settings = list(pairs(recipe))
    found = [f"{key}={value}" for key, value in settings if key == "trust_remote_code" and value is not False]
    hosts = [value for key, value in settings if key == "vllm_server_host"]
    urls = [value for key, value in settings if key == "vllm_server_base_url" and value]
    found += [f"vllm_server_host={host}" for host in hosts if host not in LOOPBACK]
    found += [f"vllm_server_base_url={url}" for url in urls if url.split("//")[-1].rsplit(":", 1)[0] not in LOOPBACK]
    if ("vllm_mode", "server") in settings and not hosts and not urls:
        found.append("vllm_mode=server without vllm_server_host")
    return found


def pairs(node: Any) -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield key, value
        yield from pairs(value)
    for value in node if isinstance(node, list) else ():
        yield from pairs(value)
