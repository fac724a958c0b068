"""The model that is trained: how it is built, and its loss."""

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
from transformers import LlamaConfig, LlamaForCausalLM

from relora.budget.cost import LlamaShape
from relora.config.groups import ModelConfig
from relora.core.loss import summed_linear_cross_entropy

COMPILER = "inductor"
"""The backend of torch.compile; one that generates no code traces the same graphs in less time."""


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
