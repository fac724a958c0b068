"""Build the model that is trained, and compute its loss."""

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from relora.budget.cost import LlamaShape
from relora.common.errors import RunError
from relora.config.groups import ModelConfig
from relora.core.keeping import contexts
from relora.core.loss import IGNORED, dtype_of_products, summed_linear_cross_entropy

COMPILER = "inductor"
"""The backend of torch.compile. A backend that generates no code traces the same graphs in less time."""


def build(config: ModelConfig, shape: LlamaShape, *, end_of_text_id: int, seed: int) -> nn.Module:
    """Build a freshly initialised fp32 model on the CPU. Its weights depend only on `config`, `shape` and `seed`.

    Args:
        config: Settings of the model besides its sizes.
        shape: The sizes.
        end_of_text_id: Token id for the beginning and the end of a text.
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config(config, shape, end_of_text_id=end_of_text_id))


def llama_config(config: ModelConfig, shape: LlamaShape, *, end_of_text_id: int | None = None) -> LlamaConfig:
    """Return the config of transformers. The sizes come from `shape`, and the other settings from `config`."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=False,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        use_cache=False,
    )


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer with torch.compile at its first use. All layers share one graph."""
    for layer in model.get_submodule("model.layers").children():
        layer.compile(backend=COMPILER)


@contextmanager
def precision_context(precision: str, device: torch.device) -> Iterator[None]:
    """Run the block under bf16 autocast if `precision` is "bf16_autocast"."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16_autocast"):
        yield


def logits(model: nn.Module, inputs_BxT: Tensor, *, positions_BxT: Tensor | None = None) -> Tensor:
    """Return logits_BxTxV of a causal model of transformers.

    Args:
        model: The model.
        inputs_BxT: Token ids.
        positions_BxT: As in `final_hidden`.

    Raises:
        RunError: The model does not accept positions.
    """
    if positions_BxT is None:
        return model(input_ids=inputs_BxT, use_cache=False).logits
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RunError(
            f"data.attend_across_documents=false gives each token a position, and {type(model).__name__} accepts none; "
            "set it to true"
        )
    mask = attention_within_documents(positions_BxT, next(model.parameters()).dtype)
    return model(input_ids=inputs_BxT, attention_mask=mask, position_ids=positions_BxT, use_cache=False).logits


def attention_within_documents(positions_BxT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the attention mask of packed documents: 0 where attention is allowed, and -inf elsewhere.

    A token attends to itself and to the earlier tokens of its document. The mask is added to the scores. torch turns a
    boolean mask into such a mask in each layer, and keeps each of them for the backward pass.

    Args:
        positions_BxT: The place of each token in its document.
        dtype: The type of the queries.

    Returns:
        mask_Bx1xTxT. The third dimension is that of the queries.
    """
    places_T = torch.arange(positions_BxT.shape[1], device=positions_BxT.device)
    begins_Bx1xTx1 = (places_T - positions_BxT)[:, None, :, None]
    allowed_Bx1xTxT = (places_T <= places_T[:, None]) & (places_T >= begins_Bx1xTx1)
    mask_Bx1xTxT = torch.zeros(allowed_Bx1xTxT.shape, dtype=dtype, device=positions_BxT.device)
    return mask_Bx1xTxT.masked_fill_(~allowed_Bx1xTxT, -math.inf)


def _is_ours(model: nn.Module) -> TypeGuard[LlamaForCausalLM]:
    """Whether `model` computes as one that `build` makes, with a head that is not wrapped."""
    return (
        isinstance(model, LlamaForCausalLM)
        and type(model).forward is LlamaForCausalLM.forward
        and type(model.model) is LlamaModel
        and model.config._attn_implementation == "sdpa"
        and type(model.lm_head) is nn.Linear
    )


def final_hidden(
    model: LlamaForCausalLM, inputs_BxT: Tensor, *, positions_BxT: Tensor | None = None, recompute: bool
) -> Tensor:
    """Return hidden_BxTxD after the last norm, with causal attention over whole sequences or within documents.

    The result equals that of model.model(inputs_BxT, position_ids=positions_BxT). That call also looks for packed
    sequences, which copies a number from the device. The host would then wait in every forward pass until a GPU has
    finished all earlier work.

    Args:
        model: A model that `build` made.
        inputs_BxT: Token ids.
        positions_BxT: The place of each token in its document. Attention stays within the document. With None,
            attention covers the whole sequence, and positions are 0 .. T-1.
        recompute: Keep only the activations within a layer that it asks for (relora.core.keeping), and compute all
            others again in the backward pass.
    """
    decoder = model.model
    hidden_BxTxD = decoder.embed_tokens(inputs_BxT)
    # Our models use torch's own attention (sdpa). It is causal if there is no mask.
    mask = None
    if positions_BxT is not None:
        mask = attention_within_documents(positions_BxT, dtype_of_products(hidden_BxTxD))
    positions = torch.arange(inputs_BxT.shape[1], device=inputs_BxT.device)[None] if mask is None else positions_BxT
    rotary = decoder.rotary_emb(hidden_BxTxD, position_ids=positions)
    for layer in decoder.layers:
        call = partial(layer, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        if recompute:
            hidden_BxTxD = checkpoint(call, hidden_BxTxD, use_reentrant=False, context_fn=contexts)
        else:
            hidden_BxTxD = call(hidden_BxTxD)
    return decoder.norm(hidden_BxTxD)


def summed_cross_entropy(
    model: nn.Module,
    inputs_BxT: Tensor,
    targets_BxT: Tensor,
    *,
    positions_BxT: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return the sum over all targets of -log p(target), in fp32 for any precision of the model.

    For a model that `build` made, the logits of all tokens are never in memory at once. Another model may change its
    logits in its own way, so its full logits are computed.

    Args:
        model: A causal model.
        inputs_BxT: Token ids.
        targets_BxT: The token id that follows each input. IGNORED (relora.core.loss) counts nothing.
        positions_BxT: As in `final_hidden`.
        recompute: As in `final_hidden`. Only for a model that `build` made.
    """
    if _is_ours(model):
        hidden_BxTxD = final_hidden(model, inputs_BxT, positions_BxT=positions_BxT, recompute=recompute)
        return summed_linear_cross_entropy(hidden_BxTxD.flatten(0, 1), model.lm_head.weight, targets_BxT.flatten())
    logits_NxV = logits(model, inputs_BxT, positions_BxT=positions_BxT).flatten(0, 1)
    return F.cross_entropy(logits_NxV.float(), targets_BxT.flatten(), ignore_index=IGNORED, reduction="sum")
