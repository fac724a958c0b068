"""What a trained model writes."""

from pathlib import Path
from typing import Any

import torch

from relora.training.pretrained import load_pretrained, load_tokenizer


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
