"""The cost of layers in the place of the targeted matrices, against real models and against published memory."""

import pytest
import torch
from small import TINY
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from relora.budget.cost import Cost, LlamaShape
from relora.budget.replaced import factorised, refactorisation_flops, refactorisation_product_flops
from relora.config.compose import compose
from relora.config.plan import run_plan
from relora.config.plan_text import warnings
from relora.config.run import RunConfig
from relora.core.factorised import refactorise
from relora.methods.lowrank import LowRank
from relora.training.model import llama_config

VOCAB = 300
ARMS = {
    "lowrank": ["method=lowrank", "method.rank=6"],
    "lowrank of some matrices": ["method=lowrank", "method.rank=5", "method.target_modules=[q_proj,down_proj]"],
    "lowrank with muon": ["method=lowrank", "method.rank=6", "optimizer=muon"],
    "cola": ["method=cola", "method.rank=6"],
    "cola of some matrices": ["method=cola", "method.rank=5", "method.target_modules=[q_proj,down_proj]"],
    "sltrain": ["method=sltrain", "method.rank=6"],
    "sltrain of some matrices": ["method=sltrain", "method.rank=5", "method.target_modules=[q_proj,down_proj]"],
    "sltrain with muon": ["method=sltrain", "method.rank=6", "optimizer=muon", "method.density=0.2"],
}


def config_of(*overrides: str) -> RunConfig:
    return compose([*(each for each in TINY if not each.startswith("method")), *overrides])


def begun(config: RunConfig) -> nn.Module:
    """The model in training. Attention is written as the matrix products that the FLOP counter sees."""
    hf_config = llama_config(config.model, config.trained_shape(VOCAB))
    hf_config._attn_implementation = "eager"
    model = LlamaForCausalLM(hf_config).train()
    if config.trainer.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    config.method.begin(model, config)
    return model


def loss(model: nn.Module, sequences: int, length: int) -> Tensor:
    tokens_BxT = torch.zeros(sequences, length, dtype=torch.long)
    mask_Bx1xTxT = torch.zeros(sequences, 1, length, length, dtype=next(model.parameters()).dtype)
    return model(input_ids=tokens_BxT, attention_mask=mask_Bx1xTxT, use_cache=False).logits.float().sum()


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("arm", [name for name in ARMS if "muon" not in name])
def test_flops_are_those_that_torch_counts(arm: str, micro_steps: int) -> None:
    config = config_of(*ARMS[arm])
    model = begun(config)
    with FlopCounterMode(display=False) as counter:
        for _ in range(micro_steps):
            loss(model, 4 // micro_steps, 16).backward()
    expected = config.cost(VOCAB).flops_per_update(4 * 16, micro_steps=micro_steps)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ARMS)
def test_parameters_and_bytes_are_those_of_a_real_model_after_a_real_step(arm: str, precision: str) -> None:
    config = config_of(*ARMS[arm], f"trainer.precision={precision}")
    expected, model = config.cost(VOCAB), begun(config)
    optimizer = config.method.build_optimizer(model, config)
    loss(model, 4, 16).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rotary = [buffer for name, buffer in model.named_buffers() if "inv_freq" in name]
    assert expected.trainable_parameters == sum(parameter.numel() for parameter in trained)
    assert expected.weight_bytes == bytes_of([*model.parameters(), *model.buffers()]) - bytes_of(rotary)
    assert expected.gradient_bytes == bytes_of([each.grad for each in trained if each.grad is not None])
    assert expected.largest_gradient_bytes == max(bytes_of([parameter]) for parameter in trained)
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    assert expected.optimizer_bytes == bytes_of(state)
    config.method.finish(model, config)
    assert expected.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("arm", ["lowrank", "lowrank of some matrices", "sltrain"])
def test_the_matrix_products_of_a_restart_are_those_that_torch_counts(arm: str) -> None:
    config = config_of(*ARMS[arm], "method.restart_interval_steps=4")
    model, own = begun(config), config.method
    assert isinstance(own, LowRank)
    for name, parameter in model.named_parameters():
        if name.endswith("factor_B"):  # SLTrain's begins at zero, and a product of zero is left as it is
            nn.init.normal_(parameter)
    with FlopCounterMode(display=False) as counter:
        refactorise(model)
    sizes = [(each.in_features, each.out_features) for each in config.cost(VOCAB).replaced]
    assert counter.get_total_flops() == sum(refactorisation_product_flops(*each, own.rank) for each in sizes)
    of_all = sum(refactorisation_flops(*each, own.rank) for each in sizes)
    assert config.cost(VOCAB).merge_flops == of_all > counter.get_total_flops()
    made = run_plan(config)
    assert (made.restarts, made.total_flops) == (3, 14 * made.flops_per_update + 3 * of_all)


def test_the_break_even_rank_is_the_highest_that_takes_fewer_flops() -> None:
    def flops(*overrides: str) -> int:
        return run_plan(config_of(*overrides)).flops_per_update

    made = run_plan(config_of("method=lowrank", "method.rank=4"))
    rank, at_full_rank = made.break_even_rank, flops("method=full")
    assert rank is not None
    assert flops("method=lowrank", f"method.rank={rank}") < at_full_rank
    assert flops("method=lowrank", f"method.rank={rank + 1}") >= at_full_rank
    above = config_of("method=lowrank", f"method.rank={rank + 1}")
    assert f"above the break-even of {rank}" in warnings(run_plan(above), above)[0]


# --------------------------------------------------------------------------------------------- published memory

SIZES = {
    "60m": (512, 1376, 8, 128),
    "130m": (768, 2048, 12, 256),
    "350m": (1024, 2736, 24, 256),
    "1b": (2048, 5461, 24, 512),
}
"""Hidden size, intermediate size, layers and rank of GaLore's Table 2."""


def shape_of(size: str, vocab_size: int) -> LlamaShape:
    hidden, intermediate, layers, _ = SIZES[size]
    return LlamaShape(
        hidden_size=hidden, intermediate_size=intermediate, layers=layers, heads=16, kv_heads=16, vocab_size=vocab_size
    )


def cost_of(method: str, size: str, vocab_size: int) -> Cost:
    config = config_of(f"method={method}", "method.rank=1", "trainer.precision=bf16")
    config.method.rank = SIZES[size][3]  # type: ignore[attr-defined]
    return config.method.cost(shape_of(size, vocab_size), config)


def weights_and_adam_bytes(size: str, vocab_size: int) -> int:
    made = cost_of("lowrank", size, vocab_size)
    return made.weight_bytes + made.optimizer_bytes


LOW_RANK_PRINTED = {"60m": 0.26, "130m": 0.54, "350m": 1.08, "1b": 3.57}


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_of_low_rank_is_near_the_published_column(size: str) -> None:
    """Weights and Adam's moments in bf16, 6 bytes a parameter, against Table 2 of GaLore (arXiv 2403.03507).

    Only the first of the four figures is ours to the digit. Ours are 0.26, 0.56, 1.11 and 3.66 in GB of 10^9 bytes, and
    0.24, 0.53, 1.04 and 3.41 in GiB. The printed figures lie between both, nearer to GB, and no single unit gives them.
    The parameters are counted on real models in tests/budget/test_cost.py, and both vocabularies (32,000 and 32,100)
    differ by less than one digit, so the difference is in the estimate of the paper, whose steps are not published. Its
    full-rank column (.36, .76, 2.06, 7.80) has the same property: 2.06 is GiB of 368.0M parameters, 7.80 is not GiB and
    not GB of 1339.1M.
    """
    ours_gb = weights_and_adam_bytes(size, 32_100) / 1e9
    assert LOW_RANK_PRINTED[size] == pytest.approx(ours_gb, rel=0.05)
    assert ours_gb / 1.0738 < LOW_RANK_PRINTED[size] < ours_gb + 0.005
    expected = {"60m": 0.26, "130m": 0.56, "350m": 1.11, "1b": 3.66}
    assert round(ours_gb, 2) == round(weights_and_adam_bytes(size, 32_000) / 1e9, 2) == expected[size]


SLTRAIN_PRINTED = {"60m": 0.26, "130m": 0.60, "350m": 1.24, "1b": 4.16}


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_of_sltrain_is_the_published_column(size: str) -> None:
    """Weights, positions and Adam's moments, against Table 2 of SLTrain (arXiv 2406.02214), figures at second hand.

    The printed digits follow from GB of 10^9 bytes, a vocabulary of 32,000, 6 bytes for each parameter in bf16 and 8
    bytes for each position (int64), with density 0.03 in all matrices of the decoder. relora keeps positions as int32,
    so its own plan has 4 bytes for each. At 60M the sum is 0.267, which is printed as 0.26: the figure that we have is
    unverified, or it was cut and not rounded.
    """
    made = cost_of("sltrain", size, 32_000)
    positions = sum(each.fixed_bytes for each in made.replaced) // 4
    gb = (made.weight_bytes + made.optimizer_bytes + 4 * positions) / 1e9
    assert round(gb, 2) == (0.27 if size == "60m" else SLTRAIN_PRINTED[size])
    assert int(100 * gb) / 100 == 0.26 or size != "60m"
    hidden, intermediate, layers, rank = SIZES[size]
    matrices = layers * (4 * hidden * hidden + 3 * hidden * intermediate)
    factors = layers * rank * (8 * hidden + 3 * (hidden + intermediate))
    others = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
    assert gb * 1e9 == pytest.approx(6 * (factors + others) + (6 + 8) * 0.03 * matrices, rel=1e-5)


def test_factorised_layers_cost_as_written() -> None:
    made = factorised(10, 6, 3)
    assert (made.flops_per_token, made.kept_numel, made.copied_numel) == (6 * 3 * 16, 3, 48)
    assert sum(each.numel for each in made.trained) == 48
