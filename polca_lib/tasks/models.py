"""The paper's two transformers, built with TransformerLens."""

from __future__ import annotations

import warnings

from torch import nn

from polca_lib.tasks.settings import ModelSettings

ARITHMETIC = ModelSettings()
"""9,475,594 parameters (Table 1)."""

ENGLISH = ModelSettings(n_ctx=128, d_vocab=30_001, d_vocab_out=30_001)
"""40,274,737 parameters (Table 2), with 30,000 tokens and PAD."""


def build_model(settings: ModelSettings, seed: int, device: str = "cpu") -> nn.Module:
    """Build a ``HookedTransformer`` (PAPER Tables 1 and 2) in evaluation mode, with weights drawn from ``seed``.

    LayerNorm with parameters, biases and learned positions give exactly the parameter counts of the paper. The paper
    does not name the activation. The default is smooth, because the second-order term needs second derivatives.
    """
    # The import takes seconds, and pages that only read stored results need no model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(
            **settings.model_dump(exclude={"activation"}),
            d_head=settings.d_model // settings.n_heads,
            act_fn=settings.activation,
            normalization_type="LN",
            seed=seed,
            device=device,
        )
        return HookedTransformer(config).eval()
