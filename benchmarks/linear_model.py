"""The transformer of ``polca_lib.tasks.models`` from ``nn.Linear`` alone: some libraries know no other layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polca_lib.tasks.settings import ModelSettings


class LinearModel(nn.Module):
    """Sizes and number of parameters are those of ``build_model``: tokens (n, T) -> logits (n, T, d_vocab_out)."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        self.positions = nn.Embedding(config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.d_vocab_out)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embed(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, config: ModelSettings):
        super().__init__()
        self.heads = config.n_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.query, self.key, self.value, self.out = (nn.Linear(config.d_model, config.d_model) for _ in range(4))
        self.up, self.down = nn.Linear(config.d_model, config.d_mlp), nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_attention(x)
        q, k, v = (
            each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x))))
