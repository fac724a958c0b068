"""Random numbers that depend only on a key. Needs torch only."""

import hashlib

import torch


def keyed_generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends only on `key`, so that no generator state must be saved or shared."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)
