"""A small GPT on generated English.

`python my_run.py` trains it in about a minute and saves checkpoints in checkpoints/. `polca run` then calls `setup` for
model, loss and data. Replace them with your own.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from polca_lib import Subject
from polca_lib.tasks.grammar import VOCABULARY, document

CONTEXT, WIDTH, STEPS = 32, 64, 400


class Block(nn.Module):
    """Residual attention and a residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """A transformer with two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(VOCABULARY), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, len(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Loss of each token except the first of its window, in nats: (window * token,)."""
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def text(seed: int, n: int) -> Tensor:
    """``n`` windows of concatenated documents: (window, token)."""
    rng, words = np.random.default_rng(seed), []
    while len(words) < n * CONTEXT:
        words += list(document(rng).ids)
    return torch.tensor(words[: n * CONTEXT]).reshape(n, CONTEXT)


def setup() -> Subject:
    """Model, loss and data for `polca`; it reads the weights from the checkpoints."""
    validation = text(seed=1, n=100)
    tokens = pd.DataFrame({"text": [VOCABULARY[word] for word in validation[:, 1:].flatten()]})
    tokens["example"], tokens["position"] = np.divmod(np.arange(len(tokens)), CONTEXT - 1)
    return Subject(GPT().eval(), loss, validation, hessian=text(seed=2, n=50), tokens=tokens)


def train() -> None:
    """Train, and save a checkpoint whenever the mean loss has fallen by 0.05 nats, and at least every 15 steps."""
    torch.manual_seed(0)
    model, windows, watched = GPT(), text(seed=3, n=64 * STEPS // 10), text(seed=4, n=16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 100))
    folder = Path(__file__).parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    last, at_last = 0, float("inf")
    for step in range(STEPS + 1):
        with torch.no_grad():
            now = loss(model, watched).mean().item()
        if at_last - now >= 0.05 or step - last >= 15 or step == STEPS:
            save_file(model.state_dict(), folder / f"step-{step}.safetensors")
            last, at_last = step, now
        batch = windows[torch.randint(len(windows), (64,))]
        mean = loss(model, batch).mean()
        optimiser.zero_grad()
        mean.backward()
        optimiser.step()
        warm_up.step()
        if step % 100 == 0:
            print(f"step {step}: loss {mean.item():.3f}")


if __name__ == "__main__":
    train()
