"""Write models and tokenizers to Hugging Face folders, and load them with checks."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from relora.common.errors import RunError, first_line
from relora.common.files import check_weight_sums, crc32_of, publishing
from relora.training.architecture import Architecture, register_own_classes

logging.disable_progress_bar()

RUN_FILE = "relora.json"
"""A file beside the weights of an exported model, with the settings to evaluate it as its run did."""

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

TOKENIZER_PROBE = "def main(n: int) ->  str:\n    return f'{n + 1} Grüße, 世界!'\n"
"""A text that different tokenizers encode differently."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of from_pretrained: nothing is downloaded, a folder's own code is not run, and the user is not asked."""


def save_pretrained(
    model: nn.Module,
    tokenizer_file: Path | None,
    folder: Path,
    run: dict[str, Any],
    tokenizer_config: dict[str, Any] | None,
    architecture: Architecture | None = None,
) -> None:
    """Write a Hugging Face folder with weights, config and tokenizer, plus relora.json.

    It is written to a temporary folder beside it, which is renamed when it is complete and on the disk. So `folder` is
    never incomplete.

    Args:
        model: A model of transformers.
        tokenizer_file: Copied as tokenizer.json. None for a model of token ids without a tokenizer.
        folder: The folder to create.
        run: Content of relora.json, to which the checksums of the weights are added.
        tokenizer_config: Content of tokenizer_config.json.
        architecture: What the model is, if it is no plain Llama. Its modelling file becomes part of the folder.
    """
    with publishing(folder) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        if architecture is not None:
            architecture.write(temporary)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, temporary / TOKENIZER)
            (temporary / TOKENIZER_CONFIG).write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        sums = {path.name: crc32_of(path) for path in sorted(temporary.glob("*.safetensors"))}
        (temporary / RUN_FILE).write_text(json.dumps({**run, "crc32": sums}, indent=2) + "\n")


@contextmanager
def _loading(folder: Path, what: str) -> Iterator[None]:
    """Turn errors of transformers inside the block into a RunError of one line, and silence its warnings."""
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
    """Load the model of a local Hugging Face folder, in its stored precision and in evaluation mode.

    Code in the folder is never run. For a model that is no plain Llama, the class is that of the method's own module.

    Raises:
        RunError: The model cannot be loaded, the weights changed after the export, or they do not match config.json.
    """
    check_weight_sums(folder)
    register_own_classes(folder)
    with _loading(folder, "model"):
        settings: dict[str, Any] = {**LOCAL, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **settings)
    model, info = loaded
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise RunError(
            f"the model in {folder} cannot be loaded: {name} has the shape {tuple(found)}, and config.json requires "
            f"{tuple(wanted)}; restore the file that was changed"
        )
    if info["missing_keys"]:
        raise RunError(
            f"the model in {folder} cannot be loaded: config.json requires {min(info['missing_keys'])}, which the "
            "weights do not have; restore the file that was changed"
        )
    model = model.eval()
    nn.Module.to(model, device)
    return model


def check_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Raise ValueError unless both models have the same parameters and buffers: names, shapes, types and all bits."""
    ours, theirs = model.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one of the two models has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    for name, value in ours.items():
        found = theirs[name]
        if (value.dtype, value.shape) != (found.dtype, found.shape):
            raise ValueError(
                f"{name} is {found.dtype} of {tuple(found.shape)}, not {value.dtype} of {tuple(value.shape)}"
            )
        if not torch.equal(value, found) and not torch.equal(*(_bits(each) for each in (value, found))):
            raise ValueError(f"{name} differs in {int((value != found).sum()):,} of {value.numel():,} values")


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor as bytes. torch.equal can compare these also for NaN, which does not equal itself."""
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a local Hugging Face folder, with the class that its tokenizer_config.json names.

    Code in the folder is never run. Raises RunError if the tokenizer cannot be loaded.
    """
    if not any(folder.glob("token*")) and not any(folder.glob("*.model")):
        raise RunError(f"{folder} has no tokenizer; copy the tokenizer.json of the model's tokens into it")
    with _loading(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


def loadable_tokenizer_config(tokenizer_file: Path) -> tuple[dict[str, Any], str | None]:
    """Return a tokenizer_config.json for an exported model that transformers can load.

    This is the one beside `tokenizer_file`, if it works. It does not work if it names its own code (auto_map), if its
    class cannot be loaded, or if its class makes other tokens than `tokenizer_file`, which encoded the text. Then the
    class is replaced by PreTrainedTokenizerFast.

    Returns:
        The content of the file, and a note for the user if the class was replaced.

    Raises:
        RunError: PreTrainedTokenizerFast cannot load the file either.
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
                f"note: the class {settings.get('tokenizer_class')} in the tokenizer_config.json of data.tokenizer "
                f"cannot be used ({reason}); the exported model gets PreTrainedTokenizerFast instead, which "
                "makes the same tokens as its tokenizer.json"
            )
    raise RunError(f"transformers cannot load the tokenizer of data.tokenizer: {last}; use another tokenizer.json")


def _tokenizer_problem(tokenizer_file: Path, settings: dict[str, Any]) -> str | None:
    """Return why transformers cannot use `tokenizer_file` with `settings`, or None if it can."""
    if "auto_map" in settings:
        return "it names its own code in auto_map, which is never run"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(tokenizer_file, folder / TOKENIZER)
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings))
        try:
            tokens = AutoTokenizer.from_pretrained(folder, **LOCAL)(TOKENIZER_PROBE, add_special_tokens=False)
        except Exception as error:  # a wrong class can raise any error
            return f"{type(error).__name__}: {first_line(error)}".replace(f"{folder}/", "")
    plain = PreTrainedTokenizerFast(tokenizer_file=os.fspath(tokenizer_file))
    if tokens["input_ids"] != plain(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]:
        return "it makes other tokens than the tokenizer.json"
    return None
