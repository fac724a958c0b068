"""What `relora evaluate` prints: the perplexity, and all that is needed to compare it with another one."""

from typing import TYPE_CHECKING, Any

from relora.common.perplexity import bits_per_token
from relora.config.data import DataConfig

if TYPE_CHECKING:
    from relora.data.corpus import Corpus
    from relora.training.evaluate import Evaluation

DIVISOR = "the sum of -ln p over all predicted tokens, divided by their number"
BITS_PER_BYTE = (
    "bits per token, times all tokens of the split (with the end-of-text token of each document), divided by the "
    "bytes of its text (UTF-8, without end-of-text tokens)"
)


def values(result: "Evaluation", sequences: int, data: DataConfig, corpus: "Corpus", split: str) -> dict[str, Any]:
    """Return the figures and how they were measured, for --json.

    Args:
        result: The evaluation of the split.
        sequences: The sequences that were evaluated.
        data: The settings of the text.
        corpus: The prepared text.
        split: The name of the split.
    """
    from relora.training.figures import split_bits_per_byte

    counts, length = corpus.splits[split], data.sequence_length_tokens
    return {
        "perplexity": result.perplexity,
        "loss": result.loss,
        "tokens": result.tokens,
        "split": split,
        "bits_per_token": bits_per_token(result.loss),
        "bits_per_byte": split_bits_per_byte(result, counts),
        "text": data.source_words(),
        "split_tokens": counts["tokens"],
        "split_bytes": counts.get("bytes"),
        "sequences": sequences,
        "sequence_length_tokens": length,
        "divisor": DIVISOR,
        "context": _context(data),
        **corpus.identity,
    }


def _context(data: DataConfig) -> str:
    """Describe the tokens that a prediction depends on (relora.data.sequences)."""
    length = data.sequence_length_tokens
    if data.packing == "pad":
        return (
            f"padded: a sequence is the beginning of a document, up to {length} predicted tokens; a token is predicted "
            "from the tokens before it in its document; the first token of a document, and those after the sequence, "
            "are not predicted"
        )
    across = "also across the ends of documents"
    if not data.attend_across_documents:
        across = "but only from those of its own document"
    return (
        f"packed: the split is one stream of documents, cut into sequences of {length} predicted tokens; a token is "
        f"predicted from the tokens before it in its sequence, the first from 1 token and the last from {length}, "
        f"{across}; each token is predicted once, except the first of the split and those after the last whole sequence"
    )


def text(values: dict[str, Any]) -> str:
    """Return `values` for people."""
    per_byte = values["bits_per_byte"]
    bits = f"{values['bits_per_token']:.4f} bits per token"
    bits += (
        f", {per_byte:.4f} bits per byte ({BITS_PER_BYTE}: {values['split_bytes']:,})"
        if per_byte is not None
        else "; bits per byte are not known, because the corpus does not state the bytes of its text"
    )
    rows = [
        ("text", f"{values['text']} (corpus {values['corpus_digest']}, tokenizer {values['tokenizer_digest']})"),
        ("split", f"{values['split']}: {values['split_tokens']:,} tokens, {values['sequences']:,} sequences"),
        ("divisor", values["divisor"]),
        ("context", values["context"]),
        ("bits", bits),
    ]
    first = (
        f"perplexity {values['perplexity']:.4f} (loss {values['loss']:.5f}) on {values['tokens']:,} tokens of "
        f"{values['split']}"
    )
    return "\n".join([first, *(f"{name:<9}{value}" for name, value in rows)])
