"""Text generation with a trained model."""

from pathlib import Path
from typing import Any

import torch

from relora.training.pretrained import load_pretrained, load_tokenizer


def sample(folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Return the prompt with the text that the model generates after it. Equal arguments give the same text.

    Args:
        folder: A Hugging Face folder with the model and its tokenizer.
        prompt: The beginning of the text. If it is empty, the tokenizer's end-of-text token is used.
        max_new_tokens: Limit of the generated tokens. The model's context is another limit.
        temperature: Temperature of top-50 sampling. With 0, each token is the most probable one.
        seed: Seed of the sampling.

    Raises:
        ValueError: The prompt fills the model's context.
    """
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", return_token_type_ids=False)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {inputs['input_ids'].shape[1]} tokens, and the model's context has only "
            f"{model.config.max_position_embeddings}; shorten the prompt"
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
