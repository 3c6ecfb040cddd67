import re

import numpy as np
import pytest
from pydantic import ValidationError

from polca_lib.method.settings import ClusteringSettings
from polca_lib.tasks.settings import PRESET_NAMES, RunSettings, TrainingSettings, field_names

KEYED = {
    *("steps", "batch_size", "learning_rate", "warmup_steps", "weight_decay", "betas", "precision"),
    "checkpoint_every",
}
"""Settings of training in the keys of runs made by version 0.3 and before."""


@pytest.mark.parametrize("task", ["addition", "grammar", "wikipedia"])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_preset_is_valid_and_survives_json(task, preset):
    config = RunSettings.from_preset(preset, task=task)
    assert (config.task, config.preset) == (task, preset)
    assert RunSettings.model_validate_json(config.model_dump_json()) == config


def test_paper_preset_has_the_numbers_of_the_paper():
    settings = RunSettings.from_preset("paper").model_dump()
    expected = {
        "model": {
            "n_layers": 3,
            "d_model": 512,
            "n_heads": 4,
            "d_mlp": 2048,
            "n_ctx": 12,
            "d_vocab": 12,
            "d_vocab_out": 10,
        },
        "training": {
            "steps": 10_000,
            "batch_size": 64,
            "learning_rate": 1e-5,
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "checkpoint_every": 20,
        },
        "data": {"validation_examples": 1250, "hessian_examples": 1250},
        "basis": {"kind": "hessian", "every": 200, "k": 1},
        "clustering": {
            "order": "second",
            "scaling": "raw",
            "min_cluster_size": 150,
            "min_samples_divisor": 15,
            "breakthrough_window": 100,
            "hidden_after": 1000,
        },
    }
    assert {s: {f: settings[s][f] for f in fields} for s, fields in expected.items()} == expected


def test_paper_preset_finds_fifty_vectors_at_every_200th_step():
    config = RunSettings.from_preset("paper")
    assert config.n_vectors == 50
    assert config.basis_steps == [200 * i for i in range(1, 51)]
    assert config.training.checkpoint_steps == [20 * i for i in range(501)]


def test_number_of_vectors_is_checkpoints_times_k_unless_given():
    assert RunSettings.from_preset("smoke", **{"basis.k": 3}).n_vectors == 15
    assert RunSettings.from_preset("smoke", **{"basis.k": 3, "basis.n_vectors": 7}).n_vectors == 7


def test_overrides_replace_single_fields_and_leave_the_presets_as_they_are():
    before = RunSettings.from_preset("smoke")
    plain, other = (RunSettings.from_preset("smoke", **o) for o in ({}, {"basis.kind": "random", "seed": 7}))
    assert (other.basis.kind, other.seed) == ("random", 7)
    assert other.basis.every == plain.basis.every
    assert other.training == plain.training
    assert before == RunSettings.from_preset("smoke")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"basis.kindd": "random"}, ["'basis.kindd'", "did you mean 'basis.kind'", "training.steps"]),
        ({"something": 1}, ["'something'", "allowed", "basis.kind"]),
        ({"basis.kind": "fourier"}, ["basis.kind", "fourier", "hessian", "shuffled", "random", "parameters"]),
        ({"basis.k": 0}, ["basis.k", "greater than or equal to 1", "0"]),
        ({"basis.k": "many"}, ["basis.k", "integer", "many"]),
        ({"basis.n_vectors": 6}, ["basis.n_vectors = 6", "needs 6 checkpoints", "basis.k = 1", "there are 5"]),
        ({"basis.n_vectors": 11, "basis.k": 2}, ["basis.n_vectors = 11", "needs 6 checkpoints", "there are 5"]),
        ({"basis.every": 30}, ["basis.every = 30", "training.checkpoint_every = 20", "20, 40, 60"]),
        ({"basis.every": 220}, ["basis.every = 220", "training.steps = 200"]),
        ({"training.checkpoint_every": 30}, ["training.checkpoint_every = 30", "training.steps = 200", "25, 40, 50"]),
        ({"training.state_every": 50}, ["training.state_every = 50", "20, 40, 60"]),
        ({"training.checkpoints": "cubic"}, ["training.checkpoints", "cubic", "'even' or 'log'"]),
        (
            {"training.checkpoints": [0, 50, 40, 200]},
            ["training.checkpoints = 0, 50, 40, 200: 40 follows 50", "'even', 'log'", "0 to training.steps = 200"],
        ),
        ({"training.checkpoints": [0, 40, 40, 200]}, ["training.checkpoints = 0, 40, 40, 200: 40 follows 40"]),
        ({"training.checkpoints": [20, 40, 200]}, ["training.checkpoints = 20, 40, 200; allowed: 'even'"]),
        ({"training.checkpoints": []}, ["training.checkpoints = ; allowed: 'even'"]),
        ({"training.checkpoints": [0, 40, 160]}, ["training.checkpoints = 0, 40, 160; allowed: 'even'", "steps = 200"]),
        ({"training.checkpoints": [0, 40, 240]}, ["training.checkpoints = 0, 40, 240; allowed: 'even'", "steps = 200"]),
        ({"training.n_checkpoints": 9}, ["training.n_checkpoints = 9", "training.checkpoints = 'log'"]),
        (
            {"training.checkpoints": "log", "training.n_checkpoints": 202},
            ["training.n_checkpoints = 202", "2 to training.steps + 1 = 201"],
        ),
        (
            {"training.checkpoints": "log", "training.checkpoint_every": 30},
            ["training.checkpoint_every = 30", "25, 40, 50"],
        ),
        (
            {"training.checkpoints": "log"},
            ["basis.every = 40 needs a checkpoint at step 40", "0, 1, 2, 4, ..., 114, 200; allowed: None"],
        ),
        (
            {"training.checkpoints": [0, 10, 200], "basis.every": None, "basis.n_vectors": 2},
            ["clustering.breakthrough_window = 40", "at most 10"],
        ),
        ({"training.steps": 0}, ["training.steps", "greater than 0", "0"]),
        ({"training.learning_rate": -1.0}, ["training.learning_rate", "greater than 0", "-1.0"]),
        ({"clustering.breakthrough_window": 50}, ["clustering.breakthrough_window = 50", "20, 40, 60"]),
        ({"clustering.scaling": "log"}, ["clustering.scaling", "log", "raw", "unit", "zscore"]),
        ({"clustering.order": "third"}, ["clustering.order", "third", "first", "second", "exact", "trapezoid"]),
        ({"clustering.min_cluster_size": 1}, ["clustering.min_cluster_size", "greater than or equal to 2", "1"]),
        ({"data.validation_examples": 3}, ["data.validation_examples = 3", "12 tokens", "at least 4 examples"]),
        ({"model.n_heads": 5}, ["model.n_heads = 5", "model.d_model = 32", "1, 2, 4, 8, 16, 32"]),
        ({"model.activation": "sine"}, ["model.activation", "sine", "gelu", "relu"]),
        ({"device": "cuda:99"}, ["device = 'cuda:99'", "allowed: cpu"]),
        ({"device": "abacus"}, ["device = 'abacus'", "allowed: cpu"]),
        ({"seed": -1}, ["seed", "greater than or equal to 0", "-1"]),
        ({"memory": 0}, ["memory", "greater than 0", "0"]),
    ],
)
def test_bad_input_is_refused_with_field_value_and_what_is_allowed(overrides, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        RunSettings.from_preset("smoke", **overrides)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(("steps", "n"), [(1, 2), (12, 7), (12, 13), (200, 11), (1200, 61), (14_000, 71), (10**6, 5)])
def test_log_checkpoints_are_as_many_as_asked_for_and_ever_further_apart(steps, n):
    found = TrainingSettings(steps=steps, checkpoint_every=steps, checkpoints="log", n_checkpoints=n).checkpoint_steps
    gaps = np.diff(found)
    assert (len(found), found[0], found[-1]) == (n, 0, steps)
    assert gaps.min() >= 1
    # A gap may be one step shorter than that before it, because steps are rounded.
    assert (np.diff(gaps) >= -1).all()
    # Where the logarithm leaves room, each step is the same factor of that before it.
    wide = np.array(found[1:])[gaps > 20]
    ratios = wide[1:] / wide[:-1]
    assert ratios.max(initial=1) / ratios.min(initial=1e9) < 1.05


def test_log_checkpoints_are_as_many_as_even_ones_unless_given():
    assert len(TrainingSettings(steps=200, checkpoints="log").checkpoint_steps) == 11
    assert TrainingSettings(steps=200, checkpoints=[0, 3, 200]).checkpoint_steps == [0, 3, 200]


def test_key_of_even_checkpoints_has_no_later_setting_and_others_name_their_steps():
    even = TrainingSettings(steps=40)
    assert even.key == {name: even.model_dump(mode="json")[name] for name in KEYED}
    log = TrainingSettings(steps=40, checkpoints="log", n_checkpoints=4)
    assert log.key == TrainingSettings(steps=40, checkpoints=log.checkpoint_steps, checkpoint_every=10).key
    assert log.key["checkpoints"] == log.checkpoint_steps == [0, 1, 6, 40]


def test_vectors_without_a_cadence_are_spread_over_uneven_checkpoints():
    uneven = {"training.checkpoints": "log", "basis.every": None, "basis.n_vectors": 5}
    settings = RunSettings.from_preset("smoke", **uneven)
    assert settings.training.checkpoint_steps == [0, 1, 2, 4, 7, 12, 21, 37, 65, 114, 200]
    assert settings.basis_steps == [2, 7, 21, 65, 200]
    assert settings.n_vectors == 5
    every = RunSettings.from_preset("smoke", **{"training.checkpoints": [0, 10, 40, 50, 80, 120, 160, 200]})
    assert every.basis_steps == [40, 80, 120, 160, 200]
    # States need no checkpoint at their step, and a window needs no cadence.
    free = {**uneven, "training.state_every": 33, "clustering.breakthrough_window": 41}
    assert RunSettings.from_preset("smoke", **free).training.state_every == 33


def test_unknown_preset_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"preset = 'papr' is unknown; allowed: smoke, laptop, paper"):
        RunSettings.from_preset("papr")


def test_as_many_tokens_as_two_clusters_need_are_enough():
    assert RunSettings.from_preset("smoke", **{"data.validation_examples": 4}).data.validation_examples == 4


def test_memory_is_what_is_asked_for():
    assert RunSettings.from_preset("smoke").memory is None
    assert RunSettings.from_preset("smoke", memory=2**30).memory == 2**30


def test_field_names_are_all_leaves_of_the_configuration_but_the_preset():
    expected = []
    for name, value in RunSettings.from_preset("smoke").model_dump().items():
        expected += [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]
    assert sorted(field_names()) == sorted(set(expected) - {"preset"})


@pytest.mark.parametrize("name", field_names())
def test_every_field_can_be_overridden_by_its_name(name):
    config = RunSettings.from_preset("smoke")
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    assert RunSettings.from_preset("smoke", **{name: value}) == config


def test_configuration_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        ClusteringSettings().order = "first"
