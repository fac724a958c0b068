"""What a prepared corpus looks like: sizes, lengths, tokens that are used, and sequences as the model sees them."""

from pathlib import Path
from typing import Any

import numpy as np

from relora.common.files import read_json
from relora.common.tables import aligned, in_units
from relora.config.data import DataConfig
from relora.data.corpus import Corpus
from relora.data.sequences import IGNORED
from relora.data.source import SPLITS
from relora.data.tokenizer import load_tokenizer

SAMPLES = 3
BLOCK_TOKENS = 1 << 24
BAR_CHARACTERS = 40


def inspect(corpus: Corpus, config: DataConfig, seed: int) -> dict[str, Any]:
    """Return the facts about a corpus as JSON values.

    Args:
        corpus: The prepared corpus.
        config: The kind and length of the sequences.
        seed: The order of training, whose first sequences are the samples.
    """
    splits, meta = {name: _split(corpus, name) for name in SPLITS}, read_json(corpus.folder / "meta.json")
    used = np.zeros(corpus.vocab_size, np.int64)
    for name in SPLITS:
        tokens = np.memmap(corpus.folder / f"{name}.bin", dtype=corpus.dtype, mode="r")
        for start in range(0, len(tokens), BLOCK_TOKENS):
            used += np.bincount(tokens[start : start + BLOCK_TOKENS], minlength=corpus.vocab_size)
    found = {
        "folder": str(corpus.folder),
        "size_bytes": sum(path.stat().st_size for path in corpus.folder.iterdir()),
        "source": meta["source"],
        "corpus_digest": corpus.corpus_digest,
        "vocab_size": corpus.vocab_size,
        "splits": splits,
        "end_of_text_share": float(used[corpus.end_of_text_id] / used.sum()),
        "ids_never_used": int((used == 0).sum()),
        "near_duplicates": meta.get("near_duplicates", {}),
    }
    if corpus.tokenizer_file is not None:
        found |= _texts(corpus, corpus.tokenizer_file, config, seed, used)
    return found


def _split(corpus: Corpus, name: str) -> dict[str, Any]:
    counts = corpus.splits[name]
    starts = np.fromfile(corpus.folder / f"{name}.starts", dtype=np.uint64).astype(np.int64)
    lengths = np.diff(np.append(starts, counts["tokens"]))
    buckets = np.bincount(np.log2(np.maximum(lengths, 1)).astype(np.int64)) if len(lengths) else []
    quantiles = np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1)).astype(int).tolist() if len(lengths) else []
    return {
        **counts,
        "bytes_per_token": counts["bytes"] / counts["tokens"] if counts["tokens"] else None,
        "length_quartiles_tokens": quantiles,
        "pieces_by_length": {f"{1 << power}": int(count) for power, count in enumerate(buckets)},
    }


def _texts(corpus: Corpus, tokenizer_file: Path, config: DataConfig, seed: int, used: Any) -> dict[str, Any]:
    tokenizer = load_tokenizer(tokenizer_file, str(tokenizer_file))
    settings = read_json(corpus.folder / "tokenizer_config.json")
    unknown = settings.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    unknown_id = tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None
    is_end = unknown_id == corpus.end_of_text_id
    batch = corpus.sequences("train", config).training_batch(0, SAMPLES, seed)
    texts = []
    for inputs_T, targets_T in zip(batch.inputs_BxT.tolist(), batch.targets_BxT.tolist(), strict=True):
        count = sum(target != IGNORED for target in targets_T)
        texts.append(tokenizer.decode([*inputs_T[:count], *targets_T[count - 1 : count]], skip_special_tokens=False))
    share = None if unknown_id is None or is_end else float(used[unknown_id] / used.sum())
    return {"unknown_share": share, "samples": texts}


def text(found: dict[str, Any]) -> str:
    """Return the facts as text for people."""
    rows = [("split", "tokens", "pieces", "text", "bytes per token", "shortest, quartiles, longest (tokens)")]
    for name, split in found["splits"].items():
        per_token = f"{split['bytes_per_token']:.2f}" if split["bytes"] else "-"
        lengths = ", ".join(f"{length:,}" for length in split["length_quartiles_tokens"])
        text_bytes = in_units(split["bytes"]) if split["bytes"] else "-"
        rows.append((name, f"{split['tokens']:,}", f"{split['pieces']:,}", text_bytes, per_token, lengths))
    near = found["near_duplicates"]
    facts = [
        ("folder", f"{found['folder']}, {in_units(found['size_bytes'])}"),
        ("vocabulary", f"{found['vocab_size']:,} ids, {found['ids_never_used']:,} of them never used"),
        ("end of text", f"{found['end_of_text_share']:.3%} of the tokens"),
    ]
    if found.get("unknown_share") is not None:
        facts.append(("unknown", f"{found['unknown_share']:.3%} of the tokens"))
    if near:
        shares = ", ".join(f"{each['share']:.1%} of {each['documents']:.0f} in {name}" for name, each in near.items())
        facts.append(("near-duplicates", f"{shares}: documents with half of their 13-grams in the training text"))
    parts = [aligned(rows), aligned(facts), f"lengths of the training pieces, in tokens:\n{_histogram(found)}"]
    for number, sample in enumerate(found.get("samples", ()), start=1):
        body = "\n".join(f"  | {line}" for line in sample.splitlines())
        parts.append(f"training sequence {number}:\n{body}")
    return "\n\n".join(parts)


def _histogram(found: dict[str, Any]) -> str:
    buckets = found["splits"]["train"]["pieces_by_length"]
    most = max(buckets.values(), default=1)
    lines = [
        (f"{int(low):,} to {2 * int(low) - 1:,}", f"{count:,}", "█" * -(-BAR_CHARACTERS * count // most))
        for low, count in buckets.items()
    ]
    return aligned(lines)
