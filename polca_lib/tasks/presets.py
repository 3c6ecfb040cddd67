"""The presets ``smoke``, ``laptop`` and ``paper`` of each task, as settings by section of a configuration.

Every number of the paper's two settings stands in the presets ``paper``; the others say only where they differ. The
task ``grammar`` is not the paper's: its preset ``paper`` is the paper's English setting with the grammar for text.
"""

from __future__ import annotations

from typing import Any

from polca_lib.tasks.grammar import VOCABULARY

Settings = dict[str, dict[str, Any]]

_ADDITION: dict[str, Settings] = {
    # Section 4.1, Table 1, v3 Tables 3 and 4.
    "paper": {
        "data": {"validation_examples": 1250, "hessian_examples": 1250},
        "model": {},
        "training": {"steps": 10_000},
        "basis": {"kind": "hessian", "every": 200},
        "projection": {"curvature": True},
        "clustering": {
            "order": "second",
            "scaling": "raw",
            "min_cluster_size": 150,
            "min_samples_divisor": 15,
            "breakthrough_window": 100,
            "hidden_after": 1000,
        },
    },
    # A narrower model at ten times the learning rate passes the same four loss curves in about a seventh of the steps.
    "laptop": {
        "data": {"validation_examples": 200, "hessian_examples": 200},
        "model": {"d_model": 128, "d_mlp": 512},
        "training": {"steps": 1500, "learning_rate": 1e-4, "checkpoint_every": 25},
        "basis": {"every": 100},
        "clustering": {"min_cluster_size": 24, "breakthrough_window": 50, "hidden_after": None},
    },
    "smoke": {
        "data": {"validation_examples": 40, "hessian_examples": 20},
        "model": {"n_layers": 1, "d_model": 32, "d_mlp": 64},
        "training": {"steps": 200, "learning_rate": 3e-3, "warmup_steps": 20, "state_every": 100},
        "basis": {"every": 40},
        "clustering": {"min_cluster_size": 8, "breakthrough_window": 40, "hidden_after": None},
    },
}

# Section 5.1, Table 2, v3 Table 7. The paper says a vector every 750 steps, which gives 18, and 30 vectors: here 400
# steps apart, the closest multiple of the cadence that gives 30. 100 windows of 126 targets are its 12,600 tokens.
_ENGLISH: Settings = {
    "data": {"validation_examples": 100, "hessian_examples": 1000},
    "model": {"n_ctx": 128, "d_vocab": 30_001, "d_vocab_out": 30_001},
    "training": {"steps": 14_000, "checkpoint_every": 200, "state_every": 1000},
    "basis": {"every": 400, "n_vectors": 30},
    "projection": {"curvature": True, "curvature_examples": 16},
    "clustering": {"order": "second", "scaling": "raw", "min_cluster_size": 300, "breakthrough_window": 400},
}

_ENGLISH_SMOKE: Settings = {
    "data": {"validation_examples": 16, "hessian_examples": 8},
    "training": {
        "steps": 200,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup_steps": 20,
        "checkpoint_every": 20,
        "state_every": 100,
    },
    "basis": {"every": 40, "n_vectors": 5, "tolerance": 0.05},
    "projection": {"curvature_examples": 4},
    "clustering": {"min_cluster_size": 16, "breakthrough_window": 40},
}

_SMOKE_MODEL = {"n_layers": 1, "d_model": 32, "d_mlp": 64, "n_ctx": 32}

_GRAMMAR_WORDS = {"d_vocab": len(VOCABULARY), "d_vocab_out": len(VOCABULARY)}

_GRAMMAR: dict[str, Settings] = {
    "paper": {**_ENGLISH, "model": {"n_ctx": 128, **_GRAMMAR_WORDS}},
    # At this learning rate constructions are learned one after another, between steps 50 and 1500: at 1e-3 nearly all
    # are before step 200, where there are few checkpoints.
    "laptop": {
        "data": {"validation_examples": 100, "hessian_examples": 100},
        "model": {"n_layers": 2, "d_model": 128, "d_mlp": 512, "n_ctx": 48, **_GRAMMAR_WORDS},
        "training": {
            "steps": 1500,
            "batch_size": 32,
            "learning_rate": 2e-4,
            "checkpoint_every": 50,
        },
        "basis": {"every": 100, "n_vectors": 15},
        "projection": {"curvature_examples": 8},
        "clustering": {"min_cluster_size": 60, "breakthrough_window": 100},
    },
    "smoke": {**_ENGLISH_SMOKE, "model": {**_SMOKE_MODEL, **_GRAMMAR_WORDS}},
}

_WIKIPEDIA: dict[str, Settings] = {
    "paper": {**_ENGLISH, "corpus": {"tokenizer_articles": 100_000}},
    "laptop": {
        "data": {"validation_examples": 80, "hessian_examples": 80},
        "corpus": {"articles": 3000, "tokenizer_articles": 1000},
        "model": {"d_model": 128, "d_mlp": 512, "n_ctx": 64, "d_vocab": 4097, "d_vocab_out": 4097},
        "training": {
            "steps": 2000,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "checkpoint_every": 100,
            "state_every": 500,
        },
        "basis": {"every": 200, "n_vectors": 10},
        "projection": {"curvature_examples": 8},
        "clustering": {"min_cluster_size": 120, "breakthrough_window": 200},
    },
    "smoke": {
        **_ENGLISH_SMOKE,
        "corpus": {"articles": 40, "tokenizer_articles": 40},
        "model": {**_SMOKE_MODEL, "d_vocab": 401, "d_vocab_out": 401},
    },
}

PRESETS: dict[str, dict[str, Settings]] = {"addition": _ADDITION, "grammar": _GRAMMAR, "wikipedia": _WIKIPEDIA}
"""Settings by task and preset; those of ``smoke`` and ``laptop`` replace those of ``paper``."""
