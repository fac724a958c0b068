"""Models in and out: the one importer of transformers."""

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from relora.budget.cost import LlamaShape
from relora.common.errors import RunError, first_line
from relora.common.files import check_weight_sums, crc32_of, publishing
from relora.config.groups import ModelConfig
from relora.core.loss import summed_linear_cross_entropy

logging.disable_progress_bar()

COMPILER = "inductor"
"""The backend of torch.compile; one that generates no code traces the same graphs in less time."""

RUN_FILE = "relora.json"
"""Beside the weights of an exported model: what it takes to evaluate it as its run did."""


TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

TOKENIZER_PROBE = "def main(n: int) ->  str:\n    return f'{n + 1} Grüße, 世界!'\n"
"""A text in which tokenizers differ."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How folders are loaded: nothing is fetched, and no code that a folder brings along is run, nor is anyone asked."""


def build(config: ModelConfig, shape: LlamaShape, *, end_of_text_id: int, seed: int) -> nn.Module:
    """A freshly initialised fp32 model on the CPU: a function of (config, shape, seed) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config(config, shape, end_of_text_id=end_of_text_id))


def llama_config(config: ModelConfig, shape: LlamaShape, *, end_of_text_id: int | None = None) -> LlamaConfig:
    """Our sizes under Hugging Face's names; `shape` is what is trained, `config` the rest."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=False,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        use_cache=False,
    )


def compile_layers(model: nn.Module) -> None:
    """Let torch.compile have each layer of the decoder, at its first use: one graph serves all."""
    for layer in model.get_submodule("model.layers").children():
        layer.compile(backend=COMPILER)


@contextmanager
def precision_context(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast where `precision` asks for it."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16_autocast"):
        yield


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory_bytes` anew; where the system cannot, a CPU's stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but held back by glibc, is no need of what comes next
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held since `reset_peak_memory`: on the GPU where it trains on one, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        high = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if high is not None:
            return int(high[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fits(action: Callable[[], None]) -> bool:
    """Do `action`; False where memory ran out in it, on the GPU or the CPU."""
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        # The CPU allocator raises a RuntimeError that only its text tells.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        return False
    return True


def logits(model: nn.Module, inputs_BxT: Tensor) -> Tensor:
    """logits_BxTxV of a causal model."""
    return model(input_ids=inputs_BxT, use_cache=False).logits


def _is_ours(model: nn.Module) -> TypeGuard[LlamaForCausalLM]:
    """Whether `model` is of the kind that `build` makes, its head not wrapped."""
    return (
        type(model) is LlamaForCausalLM
        and model.config._attn_implementation == "sdpa"
        and type(model.lm_head) is nn.Linear
    )


def final_hidden(model: LlamaForCausalLM, inputs_BxT: Tensor, *, recompute: bool) -> Tensor:
    """hidden_BxTxD after the last norm, of whole sequences, each token seeing those before it.

    With `recompute`, what a layer computes on its way is not kept but computed again in the backward pass.

    What model.model(inputs_BxT) returns, without its look for packed sequences: that reads a number off the device, so
    that the host would wait in every forward pass for all that it has given a GPU to do.
    """
    decoder = model.model
    hidden_BxTxD = decoder.embed_tokens(inputs_BxT)
    positions_1xT = torch.arange(inputs_BxT.shape[1], device=inputs_BxT.device)[None]
    rotary = decoder.rotary_emb(hidden_BxTxD, position_ids=positions_1xT)
    for layer in decoder.layers:
        # No mask means causal to torch's own attention, which is what our models have.
        call = partial(layer, attention_mask=None, position_embeddings=rotary, position_ids=positions_1xT)
        hidden_BxTxD = checkpoint(call, hidden_BxTxD, use_reentrant=False) if recompute else call(hidden_BxTxD)
    return decoder.norm(hidden_BxTxD)


def summed_cross_entropy(
    model: nn.Module, inputs_BxT: Tensor, targets_BxT: Tensor, *, recompute: bool = False
) -> Tensor:
    """Sum over all targets of -log p(target), in fp32 whatever the model computes in.

    The models that are trained here never hold the logits of all tokens, nor, with `recompute`, the activations within
    a layer. One of another kind may do as it likes to its logits, and is asked for them.
    """
    if _is_ours(model):
        hidden_NxD = final_hidden(model, inputs_BxT, recompute=recompute).flatten(0, 1)
        return summed_linear_cross_entropy(hidden_NxD, model.lm_head.weight, targets_BxT.flatten())
    logits_NxV = logits(model, inputs_BxT).flatten(0, 1)
    return F.cross_entropy(logits_NxV.float(), targets_BxT.flatten(), reduction="sum")


def save_pretrained(
    model: nn.Module, tokenizer_file: Path, folder: Path, run: dict[str, Any], tokenizer_config: dict[str, Any]
) -> None:
    """Write a plain Hugging Face folder (weights, config, tokenizer) plus `run` as relora.json.

    Through a sibling folder that is renamed when it is complete and on the disk: a folder of that name is whole.
    """
    with publishing(folder) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        shutil.copyfile(tokenizer_file, temporary / TOKENIZER)
        (temporary / TOKENIZER_CONFIG).write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        sums = {path.name: crc32_of(path) for path in sorted(temporary.glob("*.safetensors"))}
        (temporary / RUN_FILE).write_text(json.dumps({**run, "crc32": sums}, indent=2) + "\n")


@contextmanager
def _loading(folder: Path, what: str) -> Iterator[None]:
    """Inside, what transformers raises for a folder that it cannot load is one line, and it writes no report of it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise RunError(
            f"the {what} in {folder} cannot be loaded: {first_line(error)} (a folder's own code is never run)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def load_pretrained(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a local Hugging Face folder, in its stored precision, in evaluation mode.

    Code in the folder is never run. Raises RunError where it cannot be loaded, where the weights are not those that
    were exported, and where they are not the ones that its config.json describes.
    """
    check_weight_sums(folder)
    with _loading(folder, "model"):
        settings: dict[str, Any] = {**LOCAL, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **settings)
    model, info = loaded
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise RunError(
            f"the model in {folder} cannot be loaded: {name} has the shape {tuple(found)}, and by its config.json "
            f"{tuple(wanted)}; restore the file that was changed"
        )
    if info["missing_keys"]:
        raise RunError(
            f"the model in {folder} cannot be loaded: its config.json asks for {min(info['missing_keys'])}, which the "
            "weights do not hold; restore the file that was changed"
        )
    model = model.eval()
    nn.Module.to(model, device)
    return model


def check_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Raise ValueError unless both have the same parameters and buffers, by name, shape, type and every bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one of them has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    for name, value in ours.items():
        found = theirs[name]
        if (value.dtype, value.shape) != (found.dtype, found.shape):
            raise ValueError(
                f"{name} is {found.dtype} of {tuple(found.shape)}, not {value.dtype} of {tuple(value.shape)}"
            )
        if not torch.equal(value, found) and not torch.equal(*(_bits(each) for each in (value, found))):
            raise ValueError(f"{name} differs in {int((value != found).sum()):,} of {value.numel():,} values")


def _bits(tensor: Tensor) -> Tensor:
    """What torch.equal compares where a value may be NaN, which equals nothing."""
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local Hugging Face folder, by the class that its tokenizer_config.json names.

    Code in the folder is never run. Raises RunError where it cannot be loaded.
    """
    with _loading(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


def loadable_tokenizer_config(tokenizer_file: Path) -> tuple[dict[str, Any], str | None]:
    """The tokenizer_config.json for an exported model, and why it is not the one beside `tokenizer_file`, if so.

    The one there may name code of its own (auto_map), or a class that cannot be loaded or that makes other tokens than
    `tokenizer_file`, which the text was encoded with: then transformers' general class takes its place. Raises RunError
    where that cannot load the file either.
    """
    settings = json.loads(tokenizer_file.with_name(TOKENIZER_CONFIG).read_text())
    reason = _tokenizer_problem(tokenizer_file, settings)
    if reason is None:
        return settings, None
    general = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    general.pop("auto_map", None)
    least = {name: general[name] for name in ("tokenizer_class", "eos_token")}
    for candidate in (general, least):
        if (last := _tokenizer_problem(tokenizer_file, candidate)) is None:
            return candidate, (
                f"note: the class {settings.get('tokenizer_class')} that the tokenizer_config.json of data.tokenizer "
                f"names does not serve ({reason}); the exported model gets PreTrainedTokenizerFast instead, which "
                "makes the same tokens as its tokenizer.json"
            )
    raise RunError(f"transformers cannot load the tokenizer of data.tokenizer: {last}; take another tokenizer.json")


def _tokenizer_problem(tokenizer_file: Path, settings: dict[str, Any]) -> str | None:
    """Why transformers cannot use `tokenizer_file` with `settings`, None where it can."""
    if "auto_map" in settings:
        return "it names code of its own in auto_map, which is never run"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(tokenizer_file, folder / TOKENIZER)
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings))
        try:
            tokens = AutoTokenizer.from_pretrained(folder, **LOCAL)(TOKENIZER_PROBE, add_special_tokens=False)
        except Exception as error:  # a class that does not fit raises whatever it comes upon
            return f"{type(error).__name__}: {first_line(error)}".replace(f"{folder}/", "")
    plain = PreTrainedTokenizerFast(tokenizer_file=os.fspath(tokenizer_file))
    if tokens["input_ids"] != plain(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]:
        return "it makes other tokens than the tokenizer.json"
    return None


def sample(folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The prompt and what the model of `folder` writes after it; the same text for the same arguments."""
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", return_token_type_ids=False)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {inputs['input_ids'].shape[1]} tokens; the model's context is "
            f"{model.config.max_position_embeddings}"
        )
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 50}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(  # pyright: ignore[reportCallIssue] -- a mixin's method, hidden by nn.Module.__getattr__
            **inputs,
            max_new_tokens=min(max_new_tokens, room),
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
            **settings,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
