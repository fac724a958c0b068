"""The peak memory of an optimizer step, as plain arithmetic without torch: activations, the loss, gradients.

The numbers are for the decoder of relora.training.model as Hugging Face computes it, with torch's fused attention
(which keeps no square of the sequence) and the loss of relora.core.loss. They do not include the rounding of an
allocator and the memory that kernels need. Tests check that they are within 5% of torch's allocations.
"""

from relora.budget.cost import COMPUTE_BYTES, PLAIN, STORAGE_BYTES, Cost, LlamaShape

LOGITS_NUMEL = 2**24
"""Number of logits in memory at a time: 64 MiB in fp32."""

WIDE_BYTES = 4
"""Bytes of one fp32 element. Norms and the loss are computed in fp32 or wider."""


def layer_bytes_per_token(
    shape: LlamaShape, own: Cost, *, precision: str, plain_wrapped: tuple[tuple[int, int], ...]
) -> int:
    """Return the bytes per token that one decoder layer keeps for the backward pass.

    Args:
        shape: The sizes of the model.
        own: The cost of the model with its method.
        precision: The value of `trainer.precision`.
        plain_wrapped: (in, out) of the layer's matrices that are computed the plain way, without the merged weight.
    """
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    stored, computed = STORAGE_BYTES[precision], COMPUTE_BYTES[precision]
    # Autocast gives each matrix a copy of its input.
    inputs = 3 + 2 if stored != computed else 1 + 1
    norms = 2 * (WIDE_BYTES + stored) * hidden + inputs * computed * hidden
    attention = 2 * computed * (hidden + shape.kv_size) + WIDE_BYTES * shape.heads
    mlp = 4 * computed * intermediate
    dropped, scaled = 0 if own.mergeable else computed + 1, computed if own.trainable_scaling else 0
    low_rank = sum(own.rank * computed + i * dropped + o * scaled for i, o in plain_wrapped)
    replaced = computed * sum(each.kept_numel for each in own.replaced) // shape.layers
    return norms + attention + mlp + low_rank + replaced


def peak_bytes(
    shape: LlamaShape,
    own: Cost,
    *,
    sequences_per_micro_step: int,
    sequence_length_tokens: int,
    micro_steps: int,
    precision: str,
    merged_weight: str,
    activation_checkpointing: bool,
    update_in_backward: bool,
    world_size: int,
) -> int:
    """Return the peak bytes of one optimizer step, with weights, optimizer state and all else kept between steps.

    The peak beyond the kept memory is the highest of these points:

    - At the loss, when all activations are in memory.
    - At the beginning of the backward pass.
    - At the end of the backward pass, when all gradients are in memory. From the second micro-step on, the summed
      gradients of the earlier micro-steps are in memory too.
    - When summed fp32 gradients are rounded to the stored dtype.
    - In the step of the optimizer.

    With an update in backward, only one gradient is in memory at a time.

    Args:
        shape: The sizes of the model.
        own: The cost of the model with its method.
        sequences_per_micro_step: The number of sequences in one micro-step of one process.
        sequence_length_tokens: The length of one sequence.
        micro_steps: The number of micro-steps in one optimizer step of one process.
        precision: The value of `trainer.precision`.
        merged_weight: "resident", "rebuilt" or "never".
        activation_checkpointing: Whether activations are computed again in the backward pass.
        update_in_backward: Whether the optimizer steps each parameter during the backward pass.
        world_size: The number of processes. Several processes need a buffer to sum their gradients.
    """
    tokens = sequences_per_micro_step * sequence_length_tokens
    stored, computed = STORAGE_BYTES[precision], COMPUTE_BYTES[precision]
    hidden, head_numel = shape.hidden_size, shape.vocab_size * shape.hidden_size
    ways = own.ways(merged_weight, tokens_per_micro_step=tokens, micro_steps=micro_steps)
    plain = tuple(each for each, way in zip(own.wrapped, ways, strict=True) if way == PLAIN)
    merged = (each for each, way in zip(own.wrapped, ways, strict=True) if way != PLAIN)
    of_a_layer = plain[: len(plain) // shape.layers]
    layer = tokens * layer_bytes_per_token(shape, own, precision=precision, plain_wrapped=of_a_layer)
    # Autocast copies the weights. Copies of frozen weights stay as long as the activations of their layer.
    trained_copies = frozen_copies = 0
    if stored != computed:
        absent_numel = sum(i * o for i, o in own.wrapped)
        absent_numel += sum(each.in_features * each.out_features - each.copied_numel for each in own.replaced)
        trained_copies = computed * (sum(i * o for i, o in shape.linears().values()) - absent_numel)
        frozen_copies = computed * sum(i * o + own.rank * (i + o) for i, o in plain)
    final_norm = tokens * (WIDE_BYTES + 2 * stored) * hidden

    of_head = stored * head_numel
    loss = tokens * computed * hidden + WIDE_BYTES * head_numel
    at_a_time = min(tokens, max(1, LOGITS_NUMEL // shape.vocab_size)) * shape.vocab_size
    loss += at_a_time * (WIDE_BYTES + (computed if computed < WIDE_BYTES else 0))
    if stored != computed:
        loss += tokens * computed * hidden + computed * head_numel

    in_layer = tokens * computed * (2 * hidden + shape.intermediate_size)
    if merged_weight == "rebuilt":
        in_layer += computed * max((i * o for i, o in merged), default=0)
    in_layer += computed * max((each.formed_numel for each in own.replaced), default=0)
    at_the_end = own.gradient_bytes + in_layer
    if activation_checkpointing:
        kept_again = tokens * computed * sum(each.checkpointed_numel for each in own.replaced)
        between = shape.layers * tokens * stored * hidden + kept_again
        layer -= kept_again // shape.layers  # a layer that is computed again uses its kept activations
        at_the_loss = between + final_norm + trained_copies + loss
        in_layer += layer + tokens * WIDE_BYTES * hidden + (trained_copies + frozen_copies) // shape.layers
        at_the_beginning = between + of_head + in_layer
        at_the_end += layer
    else:
        kept = shape.layers * layer + final_norm + trained_copies + frozen_copies
        at_the_loss = kept + loss
        at_the_beginning = kept + of_head + (computed * head_numel if stored != computed else 0) + in_layer
    kept_bytes = own.weight_bytes + own.optimizer_bytes
    if merged_weight == "resident":
        kept_bytes += own.merged_weight_bytes(tokens_per_micro_step=tokens, micro_steps=micro_steps)
    if world_size > 1:  # the fp32 buffer in which the processes sum their gradients
        kept_bytes += WIDE_BYTES * own.trainable_parameters
    if update_in_backward:
        one = own.largest_gradient_bytes
        at_the_head = at_the_beginning - in_layer + own.optimizer_step_bytes
        at_the_end += one - own.gradient_bytes
        return kept_bytes + max(
            at_the_loss, at_the_head, at_the_beginning - of_head, at_the_end, one + own.optimizer_step_bytes
        )
    summed_bytes = summed_gradient_bytes(own, precision=precision, micro_steps=micro_steps)
    is_wide = summed_bytes > own.gradient_bytes
    if micro_steps > 1:
        # A gradient is copied before it is added to a wider sum. The largest are those of the head and the embeddings.
        copied = WIDE_BYTES * head_numel if is_wide else 0
        at_the_loss += summed_bytes
        at_the_beginning += summed_bytes + max(0, copied - in_layer)
        at_the_end += summed_bytes - own.gradient_bytes + of_head + copied
    at_the_rounding = summed_bytes + own.largest_gradient_bytes if is_wide else 0
    at_the_step = own.gradient_bytes + own.optimizer_step_bytes
    return kept_bytes + max(at_the_loss, at_the_beginning, at_the_end, at_the_rounding, at_the_step)


def summed_gradient_bytes(own: Cost, *, precision: str, micro_steps: int) -> int:
    """Return the bytes of the summed gradients. With several micro-steps, they are summed in fp32 or wider."""
    if micro_steps > 1 and STORAGE_BYTES[precision] < WIDE_BYTES:
        return WIDE_BYTES * own.trainable_parameters
    return own.gradient_bytes
