"""A checkpoint that is not the whole model is refused in one sentence, and not measured."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from attnplan.cli import app as cli
from attnplan.models.load import load_weights

Weights = dict[str, Tensor]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model.save(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {k: v for k, v in weights.items() if not any(p in k for p in parts)}


BROKEN: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "one missing": (without(QUERY), rf"lacks 1 weight \({QUERY}\), which LlamaForCausalLM needs"),
    "many missing": (without("layers.1."), r"lacks 9 weights \(.*, .*, .* and 6 more\)"),
    "no head": (without("lm_head"), r"lacks 1 weight \(lm_head\.weight\)"),
    "nothing": (lambda weights: {}, "lacks 21 weights"),
    "other names": (lambda weights: {f"x.{k}": v for k, v in weights.items()}, "lacks 21 weights"),
    "another shape": (
        lambda weights: {**weights, QUERY: torch.ones(32, 64)},
        rf"1 of its weights have other shapes .*, such as {QUERY} \(\[32, 64\], not \[64, 64\]\)",
    ),
    "a bias": (
        lambda weights: {**weights, QUERY.replace("weight", "bias"): torch.ones(64)},
        r"has 1 weight \(model.layers.1.self_attn.q_proj.bias\) that LlamaForCausalLM would ignore",
    ),
    "a norm of queries": (
        lambda weights: {**weights, QUERY.replace("q_proj", "q_norm"): torch.ones(16)},
        "config.json describes another model",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_another_model_is_refused(folder: Path, kind: str) -> None:
    change, message = BROKEN[kind]
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(str(folder))
    assert str(raised.value).startswith(f"cannot load {folder}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "extra", ["model.layers.2.self_attn.q_proj.weight", "v_head.summary.weight", "model.aim.weight"]
)
def test_weights_for_something_else_are_told(folder: Path, extra: str) -> None:
    edit(folder, lambda weights: {**weights, extra: torch.ones(64)})
    with pytest.warns(UserWarning, match=f"makes no use of 1 weight .{extra}. of its checkpoint"):
        load_weights(str(folder))


@pytest.mark.filterwarnings("error")
def test_whole_checkpoints_load_in_silence(folder: Path, tmp_path: Path) -> None:
    model = load_weights(str(folder))
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    again = load_weights(str(tmp_path / "shards"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2))
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    load_weights(str(tmp_path / "tied"))


def test_a_missing_shard_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    load_weights(str(folder)).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="cannot load") as raised:
        load_weights(str(tmp_path / "shards"))
    assert "\n" not in str(raised.value)


def test_a_file_that_torch_cannot_read_is_one_sentence(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for content in (b"", b"no pickle", b"PK\x03\x04 no zip"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="cannot load") as raised:
            load_weights(str(folder))
        assert "\n" not in str(raised.value)


def test_a_folder_with_an_adapter_is_refused(folder: Path) -> None:
    told = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"holds an adapter .* merge it into its model"):
        load_weights(str(folder))


@pytest.mark.parametrize(
    "command",
    [
        "profile tiny",
        "search tiny --max-density 0.5 --out a.yaml",
        "evaluate tiny",
        "compare tiny",
        "bench tiny",
    ],
)
def test_commands_measure_no_random_weights(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    edit(folder, without(QUERY))
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "argv", ["attnplan", *command.split(), "--context", "128"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "its checkpoint lacks 1 weight" in capsys.readouterr().err.rstrip().split("\n")[-1]
    assert not (folder.parent / "a.yaml").exists()
