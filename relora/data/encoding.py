"""Turn text into token files: train or copy a tokenizer, and encode every split. Imports tokenizers."""

import codecs
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from relora.common.errors import DamagedFile
from relora.common.files import read_json
from relora.config.data import DataConfig, tokenizer_file
from relora.data.documents import FORMAT, Splits, digest_of
from relora.data.readers import CorpusError

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_TRAINING_BYTES = 200_000_000
"""The tokenizer is trained on no more text: beyond this, a BPE vocabulary no longer changes."""
BATCH_PIECES = 512


def train_tokenizer(config: DataConfig, files: list[Path], splits: Splits, folder: Path) -> str:
    """Train a byte-level BPE tokenizer on the training split, save it in `folder`, and return its end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def training_text() -> Iterator[str]:
        read = 0
        for split, piece, _ in splits.assign(files, config.text_field):
            if split == "train":
                read += len(piece)
                yield piece
                if read >= TOKENIZER_TRAINING_BYTES:
                    return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **special}, indent=2) + "\n")
    return END_OF_TEXT


def copy_tokenizer(source: str, folder: Path, log_line: Callable[[str], None]) -> str:
    """Copy the user's tokenizer into `folder` and return its end-of-text token.

    The copy does not truncate or pad. transformers leaves these settings in a tokenizer that was once called with
    truncation=True or padding=True, and with them a long document would lose its end.

    Args:
        source: A tokenizer.json or its folder.
        folder: It gets tokenizer.json and tokenizer_config.json.
        log_line: Called with a message if the tokenizer would truncate or pad.

    Raises:
        CorpusError: The files cannot be read, or the tokenizer has no end-of-text token.
    """
    file = tokenizer_file(source)
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
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        added = [entry["content"] for entry in made.get("added_tokens", [])]
        token = next((known for known in (END_OF_TEXT, "</s>", "<eos>") if known in added), None)
    if token is None:
        raise CorpusError(f"the tokenizer {file} has no end-of-text token; set eos_token in its tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}, indent=2) + "\n")
    return token


def write_tokens(
    config: DataConfig, files: list[Path], splits: Splits, folder: Path, end_of_text: str
) -> dict[str, Any]:
    """Encode every split into its file.

    Args:
        config: The text and the tokenizer's source, for messages and meta.json.
        files: The files of the text.
        splits: The split of each piece.
        folder: It holds the tokenizer and gets the token files.
        end_of_text: The token after each document.

    Returns:
        The values of meta.json.

    Raises:
        CorpusError: The text or the tokenizer cannot be read, or the tokenizer does not know `end_of_text`.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CorpusError(f"data.tokenizer={config.tokenizer} cannot be read as a tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True  # a special token that is written in the text is text
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have holes
    end_of_text_id = tokenizer.token_to_id(end_of_text)
    if end_of_text_id is None:
        raise CorpusError(
            f"the tokenizer {config.tokenizer} does not know its own end-of-text token {end_of_text!r}; set eos_token "
            "in its tokenizer_config.json to a token of its vocabulary"
        )
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts = {name: {"tokens": 0, "pieces": 0} for name in SPLITS}
    digest = hashlib.blake2b(digest_size=16)
    handles = {name: (folder / f"{name}.bin").open("wb") for name in SPLITS}
    starts = {name: (folder / f"{name}.starts").open("wb") for name in SPLITS}
    pending: list[tuple[str, str, bool]] = []

    def write_pending() -> None:
        encoded = tokenizer.encode_batch_fast([piece for _, piece, _ in pending], add_special_tokens=False)
        for (split, _, ends), encoding in zip(pending, encoded, strict=True):
            ids = [*encoding.ids, end_of_text_id] if ends else encoding.ids
            handles[split].write(np.asarray(ids, dtype=dtype).tobytes())
            starts[split].write(np.asarray(counts[split]["tokens"], dtype="<u8").tobytes())
            counts[split]["tokens"] += len(ids)
            counts[split]["pieces"] += 1
        pending.clear()

    try:
        for split, piece, ends in splits.assign(files, config.text_field):
            digest.update(split.encode() + digest_of(piece) + bytes([ends]))
            pending.append((split, piece, ends))
            if len(pending) == BATCH_PIECES:
                write_pending()
        write_pending()
    finally:
        for handle in [*handles.values(), *starts.values()]:
            handle.close()
    return {
        "format": FORMAT,
        "source": asdict(config),
        "python": sys.version.split()[0] if config.name == "stdlib" else None,
        "corpus_digest": digest.hexdigest(),
        "tokenizer_digest": hashlib.blake2b((folder / "tokenizer.json").read_bytes(), digest_size=16).hexdigest(),
        "vocab_size": vocab_size,
        "end_of_text_id": end_of_text_id,
        "dtype": dtype,
        "splits": counts,
    }
