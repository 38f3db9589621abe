"""What stands beside the file of an SAE on a disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.cli.sae_files import with_beside
from steering.language.errors import InvalidRequest


def weights(path: Path, name: str = "W_enc") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, 2)}, path)
    return path


def test_a_folder_with_its_configuration(tmp_path: Path) -> None:
    file = weights(tmp_path / "sae_weights.safetensors")
    config = {"d_sae": 2, "metadata": {"hook_name": "blocks.3.hook_resid_post"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert with_beside(tmp_path, {"name": "x"}) == (file, {"name": "x", "sae": {"config": config}})


def test_what_is_given_wins(tmp_path: Path) -> None:
    file = weights(tmp_path / "layer_7" / "params.safetensors", "w_enc")
    (file.parent / "config.json").write_text("{}")
    given: dict[str, Any] = {"layers": [2], "site": "mlp_out", "sae": {"config": {"a": 1}, "k": 3}}
    assert with_beside(file, given) == (file, given)


def test_folders_say_the_place_where_the_configuration_does_not(tmp_path: Path) -> None:
    file = weights(tmp_path / "resid_post" / "layer_12_width_16k_l0_medium" / "params.safetensors", "w_enc")
    assert with_beside(file.parent, {}) == (file, {"site": "resid_post", "layers": [12]})
    llama = weights(tmp_path / "L3R" / "checkpoints" / "final.safetensors", "encoder.weight")
    (tmp_path / "L3R" / "hyperparams.json").write_text(json.dumps({"hook_point_in": "blocks.3.hook_resid_post"}))
    assert with_beside(tmp_path / "L3R", {})[1]["sae"]["config"]["hook_point_in"] == "blocks.3.hook_resid_post"
    assert with_beside(tmp_path / "L3R", {})[0] == llama


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    vector = weights(tmp_path / "resid_post" / "layer_3" / "v.safetensors", "3.vector")
    (vector.parent / "config.json").write_text("{}")
    assert with_beside(vector, {"name": "x"}) == (vector, {"name": "x"})
    broken = tmp_path / "layer_3.safetensors"
    broken.write_bytes(b"\xff" * 64)
    assert with_beside(broken, {}) == (broken, {})


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    weights(tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(content)
    with pytest.raises(InvalidRequest):
        with_beside(tmp_path, {})


def test_a_folder_without_an_sae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file of an SAE"):
        with_beside(tmp_path, {})
