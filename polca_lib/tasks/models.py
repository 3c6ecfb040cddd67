"""The paper's two transformers, by TransformerLens."""

from __future__ import annotations

import warnings

from torch import nn

from polca_lib.tasks.settings import ModelSettings

ARITHMETIC = ModelSettings()
"""9,475,594 parameters (Table 1)."""

ENGLISH = ModelSettings(n_ctx=128, d_vocab=30_001, d_vocab_out=30_001)
"""40,274,737 parameters (Table 2), with 30,000 tokens and PAD."""


def build_model(settings: ModelSettings, seed: int, device: str = "cpu") -> nn.Module:
    """A ``HookedTransformer`` in evaluation mode, initialised from ``seed``.

    LayerNorm with parameters, biases everywhere and learned positions: with these the parameter counts
    of the paper's Tables 1 and 2 come out exactly. The paper does not name the activation; a smooth one
    is the default, because the second-order term needs second derivatives. The model has no dropout.
    """
    # Imported here because it takes seconds, and pages that only read stored results need no model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(
            HookedTransformerConfig(
                n_layers=settings.n_layers,
                d_model=settings.d_model,
                n_heads=settings.n_heads,
                d_head=settings.d_model // settings.n_heads,
                d_mlp=settings.d_mlp,
                n_ctx=settings.n_ctx,
                d_vocab=settings.d_vocab,
                d_vocab_out=settings.d_vocab_out,
                act_fn=settings.activation,
                normalization_type="LN",
                seed=seed,
                device=device,
            )
        ).eval()
