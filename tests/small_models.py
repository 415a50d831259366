"""Small dense GPT-2s and mixtures made from them, which decide clearly."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from moe_emergence.models import MoEGPT2LMHeadModel, upcycle

VOCAB = 64
SIZE = {
    "vocab_size": VOCAB,
    "n_positions": 48,
    "n_layer": 4,
    "n_embd": 24,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make_dense(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZE, **NO_DROPOUT, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_model(top_k: int = 2, noise: float = 0.3, **changes) -> MoEGPT2LMHeadModel:
    """Experts that differ visibly and routers that decide clearly."""
    model = upcycle(make_dense(), [1, 3], 4, top_k, noise=noise, **changes)
    with torch.no_grad():
        for layer in model.moe_layers().values():
            for parameter in layer.router.parameters():
                parameter.mul_(20)
    return model


def ids(batch: int = 3, length: int = 12, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
