"""The tokenizer of a corpus: trained on its text, or the user's own.

Imports tokenizers, and transformers for tokenizers that have no tokenizer.json.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.common.errors import DamagedFile, first_line
from relora.common.files import read_json, sha256_of
from relora.config.data import is_local, tokenizer_file
from relora.data.decoding import CorpusError
from relora.data.hub import go_offline_if_unreachable
from relora.data.source import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>")
OTHER_FORMS = (".model", ".json", ".txt", ".vocab")
"""Endings of the files of a tokenizer without a tokenizer.json. Weights beside them are not part of it."""
TOKENIZER_TRAINING_CHARACTERS = 200_000_000
"""The tokenizer is trained on no more text: beyond this, a BPE vocabulary no longer changes."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer, and save it in `folder` with its tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **special}, indent=2) + "\n")


def tokenizer_identity(source: str | None) -> str:
    """Return a digest of the files of a tokenizer, or the name of one on the hub. Empty if it is to be trained."""
    if source is None:
        return ""
    if not is_local(source):
        return source
    file = tokenizer_file(source)
    digest = hashlib.sha256()
    if file.is_file():
        for path in (file, file.with_name("tokenizer_config.json")):  # the second names the end-of-text token
            digest.update(path.read_bytes() if path.exists() else b"")
        return digest.hexdigest()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in OTHER_FORMS and path.is_file():
            digest.update(f"{path.name}/{sha256_of(path)}/".encode())
    return digest.hexdigest()


def copy_tokenizer(source: str, folder: Path, log_line: Callable[[str], None]) -> None:
    """Copy the user's tokenizer into `folder`, as tokenizer.json and tokenizer_config.json.

    The copy does not truncate or pad. transformers leaves these settings in a tokenizer that was once called with
    truncation=True or padding=True, and with them a long document would lose its end.

    Args:
        source: A tokenizer.json, a folder with the files of a tokenizer, or the name of one on the hub.
        folder: It gets tokenizer.json and tokenizer_config.json.
        log_line: Called with a message if the tokenizer would truncate or pad.

    Raises:
        CorpusError: The files cannot be read, or the tokenizer has no end-of-text token.
    """
    file = tokenizer_file(source)
    if not is_local(source) or not file.is_file():
        _convert(source, folder)
        file = folder / "tokenizer.json"
    # Editors on Windows write a byte-order mark, which the libraries do not accept.
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        made = read_json(file)
        ignored = [name for name in ("truncation", "padding") if made.get(name)]
        if ignored:
            log_line(f"note: data.tokenizer={source} has saved {' and '.join(ignored)}, which the corpus does not use")
            content = json.dumps({**made, **dict.fromkeys(ignored)}, ensure_ascii=False).encode()
        (folder / "tokenizer.json").write_bytes(content)
        settings = read_json(file.with_name("tokenizer_config.json"))
    except DamagedFile as error:
        raise CorpusError(f"data.tokenizer={source} is not a tokenizer: {error}") from error
    settings = settings or {"tokenizer_class": "PreTrainedTokenizerFast"}
    token = _written(settings.get("eos_token"))
    if token is None:
        added = [entry["content"] for entry in made.get("added_tokens", [])]
        token = next((known for known in KNOWN_ENDS if known in added), None)
    if token is None:
        raise CorpusError(f"the tokenizer {file} has no end-of-text token; set eos_token in its tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}, indent=2) + "\n")


def _written(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _convert(source: str, folder: Path) -> None:
    """Load a tokenizer of another form with transformers, and save it in `folder` as a tokenizer.json.

    Other forms are the model of sentencepiece, vocab.json with merges.txt, and a name on the hub.
    """
    offline = not is_local(source) and go_offline_if_unreachable()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, use_fast=True, trust_remote_code=False, local_files_only=offline or is_local(source)
        )
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # transformers raises errors of many classes
        why = f"transformers cannot load its files ({first_line(error)})"
        if offline:
            why = (
                "it is no file or folder here, the hub cannot be reached from this machine, and HF_HOME has no copy of "
                "it; set data.tokenizer to a folder with its files, or to null to train one on the text"
            )
        elif not is_local(source):
            why = f"it is no file or folder here, and the hub does not give it ({first_line(error)})"
        elif any(Path(source).glob("*.model")) and find_spec("sentencepiece") is None:
            why = "it is a model of sentencepiece, which is not installed; pip install 'relora[sentencepiece]'"
        raise CorpusError(f"data.tokenizer={source} cannot be used: {why}") from error
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    named = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    settings |= {name: str(token) for name, token in named.items() if token is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(file: Path, given: str | None) -> "Tokenizer":
    """Load the tokenizer.json of a corpus. Special tokens that are written in a text are text.

    Args:
        file: The tokenizer.json.
        given: data.tokenizer, for the message.

    Raises:
        CorpusError: The library cannot read the file.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CorpusError(f"data.tokenizer={given} cannot be read as a tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary(folder: Path, given: str | None) -> Vocabulary:
    """Return the vocabulary of the tokenizer in a folder.

    Args:
        folder: It has tokenizer.json and tokenizer_config.json.
        given: data.tokenizer, for the message.

    Raises:
        CorpusError: The tokenizer cannot be read, or does not know its own end-of-text token.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.json", given)
    end_of_text = read_json(folder / "tokenizer_config.json")["eos_token"]
    end_of_text_id = tokenizer.token_to_id(end_of_text)
    if end_of_text_id is None:
        raise CorpusError(
            f"the tokenizer {given} does not know its own end-of-text token {end_of_text!r}; set eos_token in its "
            "tokenizer_config.json to a token of its vocabulary"
        )
    return Vocabulary(vocab_size=max(tokenizer.get_vocab().values(), default=-1) + 1, end_of_text_id=end_of_text_id)
