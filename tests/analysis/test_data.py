"""What was promised about data is compared with what came: losses, token tables, values that are not finite."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from cases import (
    Attention,
    Mlp,
    mlp_batch,
    mlp_loss,
    problem,
    project_run,
    ragged_loss,
    tiny_checkpoints,
    token_curvatures,
    token_gradients,
)

import polca_lib.analysis.workers as workers
import polca_lib.derivatives.strategy as strategy
from polca_lib import Analysis, MaskedLoss, Shared, TokenLoss
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.analysis.workers import NonFiniteProjection, project_runs
from polca_lib.method.basis import compute_basis
from polca_lib.method.clustering import summarise_clusters
from polca_lib.method.settings import BasisSettings
from polca_lib.method.vectors import read_vectors
from polca_lib.report.contexts import contexts, nearest
from polca_lib.report.findings import members
from polca_lib.storage.artefacts import ArtefactMismatch
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.storage.columns import separate_columns, token_table

TARGETS = [0, 1, 2, 3, 0, 3, 2, 1, 3, 3]
STEPS = [0, 10, 20]


def ragged_batch(seed=0):
    """Windows of four tokens, padded with 0 to the numbers of targets."""
    ids = torch.randint(1, 5, (len(TARGETS), 4), generator=torch.Generator().manual_seed(seed))
    return ids * (torch.arange(4) <= torch.tensor(TARGETS)[:, None])


BATCH = ragged_batch()


def ragged_checkpoints(path, loss=ragged_loss):
    path.mkdir(exist_ok=True)
    checkpoints, theta = CheckpointFolder(path, TokenLoss(Attention(), loss)), problem("ragged").theta.float()
    for step in STEPS:
        checkpoints.save(step, checkpoints.token_loss.unflatten(theta))
        theta = theta + 0.3 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(step))
    return checkpoints


def expected_of(checkpoints, basis, step):
    """Losses, gradients and curvatures by brute force in float64."""
    double = TokenLoss(Attention().double(), ragged_loss)
    theta, vectors = checkpoints.theta(step).double(), read_vectors(basis).double()
    gradients = token_gradients(double, theta, BATCH) @ vectors.T
    return double(theta, BATCH), gradients, token_curvatures(double, theta, BATCH, vectors)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 20_000])
@pytest.mark.parametrize(
    "settings", [{"mode": "forward"}, {"mode": "reverse"}, {"mode": "reverse", "precision": "bfloat16"}], ids=str
)
def test_projections_of_ragged_losses_are_those_of_brute_force(tmp_path, settings, memory):
    checkpoints = ragged_checkpoints(tmp_path / "checkpoints")
    kinds = BasisSettings(kind="random", n_vectors=40), BasisSettings(kind="trajectory", n_vectors=2)
    bases = [
        compute_basis(tmp_path / f"{kind.kind}.zarr", kind, checkpoints, None, steps=STEPS[1:] * (kind.n_vectors // 2))
        for kind in kinds
    ]
    both = [ProjectionSettings(curvature=True, curvature_examples=n, **settings) for n in (3, 7)]
    tokens = pd.DataFrame({"id": range(sum(TARGETS))})
    paths = [tmp_path / "one.zarr", tmp_path / "two.zarr"]
    results = project_runs(paths, checkpoints, STEPS, BATCH, tokens, bases, both, memory)
    tolerance = 3e-2 if "precision" in settings else 1e-4
    for result, basis, examples in zip(results, bases, (3, 7), strict=True):
        if memory is not None and len(basis["vector"]) > 2:
            assert len(list((paths[0] / "gradient").glob("0.*"))) > 1  # cut into blocks
        vectors = read_vectors(basis).double()
        for index, step in enumerate(STEPS):
            loss, gradient, curvature = expected_of(checkpoints, basis, step)
            at = result.sel(step=step)
            np.testing.assert_allclose(at["loss"], loss, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(at["gradient"], gradient, rtol=1e-3, atol=tolerance)
            assert at["curvature"].shape[0] == sum(TARGETS[:examples])
            np.testing.assert_allclose(at["curvature"], curvature[: sum(TARGETS[:examples])], rtol=1e-3, atol=1e-4)
            if step != STEPS[-1]:
                theta, after = checkpoints.theta(step).double(), checkpoints.theta(STEPS[index + 1]).double()
                point = theta + vectors.T @ (vectors @ (after - theta))
                inside = TokenLoss(Attention().double(), ragged_loss)(point, BATCH)
                np.testing.assert_allclose(at["inside_loss"], inside, rtol=1e-4, atol=1e-5)


def test_samples_of_other_sizes_have_a_strategy_each(tmp_path, monkeypatch):
    checkpoints, chosen = ragged_checkpoints(tmp_path / "checkpoints"), []

    def choose(token_loss, theta, batch, vectors, **options):
        chosen.append((len(vectors), options["order"], len(batch)))
        return strategy.choose(token_loss, theta, batch, vectors, **options)

    monkeypatch.setattr(workers, "choose", choose)
    kinds = [BasisSettings(kind="random", n_vectors=2), BasisSettings(kind="trajectory", n_vectors=2)]
    bases = [compute_basis(tmp_path / kind.kind, kind, checkpoints, None, steps=STEPS[1:]) for kind in kinds]
    both = [ProjectionSettings(curvature=True, curvature_examples=n) for n in (3, 7)]
    tokens = pd.DataFrame({"id": range(sum(TARGETS))})
    project_runs([tmp_path / "one", tmp_path / "two"], checkpoints, STEPS, BATCH, tokens, bases, both)
    assert chosen == [(4, 1, 10), (2, 2, 3), (2, 2, 7)]


def test_sample_without_targets_is_refused(tmp_path):
    checkpoints = ragged_checkpoints(tmp_path / "checkpoints")
    basis = compute_basis(tmp_path / "b", BasisSettings(kind="random", n_vectors=2), checkpoints, None, steps=[10, 20])
    settings = ProjectionSettings(curvature=True, curvature_examples=1)
    tokens = pd.DataFrame({"id": range(sum(TARGETS))})
    with pytest.raises(ValueError, match=r"first 1 examples have no target.*raise projection\.curvature_examples"):
        project_run(tmp_path / "p.zarr", checkpoints, STEPS, BATCH, tokens, basis, settings)


def analyse(folder, checkpoints, batch=BATCH, **options):
    return Analysis(
        folder, checkpoints, batch,
        **{"basis": {"kind": "trajectory", "n_vectors": 2}, "clustering": {"min_cluster_size": 3}, **options},
    )  # fmt: skip


def test_tokens_know_their_example_and_position_and_any_table_of_that_size_fits(tmp_path):
    checkpoints = ragged_checkpoints(tmp_path / "checkpoints")
    run = analyse(tmp_path / "run", checkpoints)
    example = np.repeat(np.arange(len(TARGETS)), TARGETS).tolist()
    position = [position for n in TARGETS for position in range(n)]
    assert run.projections["example"].values.tolist() == example
    assert run.projections["position"].values.tolist() == position
    loss = expected_of(checkpoints, run.basis, 20)[0]
    np.testing.assert_allclose(run.projections["loss"].sel(step=20), loss, rtol=1e-4, atol=1e-5)
    table = pd.DataFrame({"text": [f"w{i}" for i in range(18)]})
    told = analyse(tmp_path / "run", checkpoints, tokens=table).projections
    assert (told["example"].values.tolist(), told["position"].values.tolist()) == (example, position)
    assert told["text"].values.tolist() == table["text"].tolist()
    own = analyse(tmp_path / "run", checkpoints, tokens=table.assign(example="mine")).tokens
    assert own["example"].tolist() == 18 * ["mine"]
    with pytest.raises(ValueError, match=r"tokens has 17 rows; allowed: 18, because 10 examples give 0 to 3 losses"):
        analyse(tmp_path / "run", checkpoints, tokens=table[:-1]).tokens  # noqa: B018


def test_masked_loss_and_data_of_a_loader_give_a_run_with_targets_alone(tmp_path):
    def padded(model, batch):
        logits, targets = model(batch["ids"][:, :-1]).flatten(0, 1), batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")

    rows = [{"ids": row, "labels": row.where(row != 0, -100)} for row in BATCH]
    loader = torch.utils.data.DataLoader(rows, batch_size=3)
    masked = MaskedLoss(padded, lambda batch: batch["labels"][:, 1:] != -100)
    run = analyse(tmp_path / "run", ragged_checkpoints(tmp_path / "c", masked), loader)
    plain = analyse(tmp_path / "plain", ragged_checkpoints(tmp_path / "c"))
    np.testing.assert_allclose(run.projections["gradient"], plain.projections["gradient"], rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="40% of the losses of validation are exactly 0.0"):
        assert len(analyse(tmp_path / "padded", ragged_checkpoints(tmp_path / "c", padded), loader).tokens) == 30


def test_finished_run_opens_without_counting_losses_also_without_a_table(tmp_path, monkeypatch):
    checkpoints = ragged_checkpoints(tmp_path / "checkpoints")
    labels = analyse(tmp_path / "run", checkpoints).labels
    monkeypatch.setattr(TokenLoss, "check", lambda *a: pytest.fail("losses were counted"))
    assert analyse(tmp_path / "run", checkpoints).labels.equals(labels)


def test_other_numbers_of_losses_than_when_the_run_began_are_refused(tmp_path):
    checkpoints = ragged_checkpoints(tmp_path / "checkpoints")
    _ = analyse(tmp_path / "run", checkpoints).tokens
    changed = ragged_checkpoints(tmp_path / "checkpoints", lambda m, b: ragged_loss(m, b[:, 1:]))
    with pytest.raises(ArtefactMismatch, match=r"gives 10 losses for validation, but 18 when this run began"):
        _ = analyse(tmp_path / "run", changed).tokens


def test_default_table_keeps_the_key_it_had_in_version_0_1(tmp_path):
    # One column, "example", whether positions are known or not.
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints", STEPS)
    run = analyse(tmp_path / "run", checkpoints, mlp_batch(5, torch.float32))
    table = pd.DataFrame({"example": np.repeat(np.arange(5), 2)})
    same = analyse(tmp_path / "run", checkpoints, mlp_batch(5, torch.float32), tokens=table)
    assert run._projection.key == same._projection.key


def test_shared_tensor_serves_basis_projections_and_workers(tmp_path):
    def loss(model, batch):
        return mlp_loss(model, (batch["x"] + batch["shift"] * batch["scale"], batch["y"]))

    x, y = mlp_batch(6, torch.float32)
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints", STEPS)
    checkpoints = CheckpointFolder(checkpoints.path, TokenLoss(Mlp(), loss))
    shift = torch.tensor([[0.1, 0.2, 0.3]])
    data = {"x": x, "y": y, "shift": Shared(shift), "scale": torch.tensor(2.0)}
    options = {"basis": {"n_vectors": 2}}
    told = analyse(tmp_path / "a", checkpoints, data, hessian=data, **options)
    plain = {**data, "shift": shift.repeat(6, 1)[:, None]}
    repeated = analyse(tmp_path / "b", checkpoints, plain, hessian=plain, **options)
    np.testing.assert_allclose(told.basis["eigenvalue"], repeated.basis["eigenvalue"], rtol=1e-4)
    np.testing.assert_allclose(abs(told.projections["gradient"]), abs(repeated.projections["gradient"]), atol=1e-4)
    for name in ("validation", "hessian"):
        wrong = {"validation": data, "hessian": data, name: {**data, "shift": shift}}
        with pytest.raises(ValueError, match=rf"tensors of {name} differ.*{name}\['shift'\] has 1"):
            Analysis(tmp_path / "c", checkpoints, **wrong)


# Columns

NASTY = [
    "pos/tag", "part of speech", "loss", "Loss", "cluster", "true", "claimed", "inside", "gradient", "movement",
    "distance", "inside_loss", "product_error", "_done", "", ".", "..", "step", "token", "vector", "sample",
    "rank", "birth_step", "medoid", "nearest", "tokens", "column_0", "column_3", "_kind", "kind", "Kind",
    "kind", "x" * 300, "größe", "名前", "a\nb", "\udc80", ".zattrs", ".zgroup", "con:", "a\\b", "quantile",
    "projected_loss", "coordinates", "_ARRAY_DIMENSIONS", 1, 1.5, None, ("a", "b"), True, "nan", "index",
    "level_0", "variable", "<b>", "low", "median", "noise", "skill", "fall",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny_checkpoints(tmp_path_factory.mktemp("data") / "checkpoints", range(0, 81, 10))


def nasty_table(n=40):
    columns = [pd.Series([f"{index}-{row % 2}" for row in range(n)]) for index in range(len(NASTY))]
    table = pd.concat(columns, axis=1)
    table.columns = pd.Index(NASTY, dtype=object)
    return table


def true_names():
    names = []
    for name in map(str, NASTY):
        names.append(name if name not in names else f"{name}.1")
    return names


@pytest.mark.slow
def test_columns_keep_their_names_whatever_they_are_to_the_last_page(tmp_path, checkpoints):
    table = nasty_table()
    run = analyse(tmp_path / "run", checkpoints, mlp_batch(20, torch.float32), tokens=table)
    shown = token_table(run.projections).drop(columns=["example", "position"])
    assert sorted(shown) == sorted(true_names())
    for index, name in enumerate(true_names()):
        assert shown[name].tolist() == table.iloc[:, index].tolist(), name
    # Ordinary names are coordinates as they are; the clusters have the columns, too.
    assert run.projections["skill"].values.tolist() == table["skill"].tolist()
    assert sorted(token_table(run.labels)) == sorted(token_table(run.projections))
    assert run.labels.name == "cluster"
    # Make clusters, and see that every table and the page come out of it.
    split = run.labels.copy(data=np.tile(1 + np.arange(40) % 2, (2, 1)))
    run.__dict__["labels"] = split
    made_of = run.breakthroughs["made_of"].tolist()
    assert all(re.match(r".*: '\d+-[01]' 100%$", text, re.DOTALL) for text in made_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = run.report(tmp_path / "report.html").read_text("utf-8")
    assert "part of speech 1-0" in page
    assert "pos/tag 0-0" in page
    again = analyse(tmp_path / "run", checkpoints, mlp_batch(20, torch.float32), tokens=table)
    assert again.labels.shape == (2, 40)


@pytest.mark.slow
def test_every_name_that_results_use_may_be_a_column(tmp_path, checkpoints):
    """The list of names in storage/columns.py is long enough."""
    batch = mlp_batch(20, torch.float32)
    run = analyse(tmp_path / "run", checkpoints, batch)
    labels = run.labels.copy(data=np.tile(1 + np.arange(40) % 2, (2, 1))).assign_coords(
        _kind=("token", np.zeros(40, int))
    )
    summary = summarise_clusters(run.curves, run.projections["loss"], labels, "raw", "_kind")
    results = [run.projections, run.curves.to_dataset(), run.labels.to_dataset(), run.findings.completeness, summary]
    results += [run.basis]
    names = {str(name) for result in results for name in (*result.variables, *result.dims)} - {"example", "position"}
    assert {"loss", "claimed", "cluster", "medoid", "birth_step", "_kind", "projected_loss"} < names
    table = pd.DataFrame({name: [f"{name}{row % 2}" for row in range(40)] for name in sorted(names)})
    named = analyse(tmp_path / "run", checkpoints, batch, tokens=table)
    assert set(table) <= set(token_table(named.projections))
    assert set(table) <= set(token_table(named.labels))
    assert not set(named.projections.data_vars) - set(run.projections.data_vars)
    named.__dict__["labels"] = named.labels.copy(data=np.tile(1 + np.arange(40) % 2, (2, 1)))
    assert named.report(tmp_path / "report.html").stat().st_size > 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "stored"),
    [
        (pd.array([1, None, 3], "Int64"), [1.0, np.nan, 3.0]),
        (pd.array([2**60, None, 1], "Int64"), [str(2**60), "", "1"]),
        (pd.array([2**60, 2, 1], "Int64"), [2**60, 2, 1]),
        (pd.array([True, None, False], "boolean"), ["True", "", "False"]),
        (pd.array([True, True, False], "boolean"), [True, True, False]),
        (pd.array([None, None, None], "Int64"), [np.nan] * 3),
        (np.array([True, None, False], dtype=object), ["True", "", "False"]),
        (np.array([1, None, "x"], dtype=object), ["1", "", "x"]),
        ([1.5, np.nan, 2], [1.5, np.nan, 2.0]),
        ([True, False, True], [True, False, True]),
        (["a", None, "nan"], ["a", "", "nan"]),
        (pd.Categorical(["u", "v", None]), ["u", "v", ""]),
        ([1j, 2, 3], ["1j", "(2+0j)", "(3+0j)"]),
        (pd.to_datetime(["2020-01-01", None, "2021-01-01"]), ["2020-01-01 00:00:00", "", "2021-01-01 00:00:00"]),
    ],
    ids=str,
)
def test_values_of_columns_are_stored_as_they_are_also_where_some_are_missing(tmp_path, checkpoints, column, stored):
    batch = tuple(part[:2, :, :] if part.ndim == 3 else part[:2] for part in mlp_batch(2, torch.float32))
    table = pd.DataFrame({"value": pd.Series(column)}).reindex([0, 1, 2, 2]).reset_index(drop=True)
    run = analyse(tmp_path / "run", checkpoints, batch, tokens=table)
    found = run.projections["value"].values.tolist()[:3]
    assert [type(value) for value in found] == [type(value) for value in stored]
    np.testing.assert_array_equal(found, stored)


def test_columns_of_an_older_store_are_shown_with_their_names():
    # Names that the results use were stored as they are; those with a space lost their place among the coordinates.
    coords = {"step": [0, 1], "token": [0, 1], "true": ("token", ["a", "b"]), "skill": ("token", ["c", "d"])}
    older = xr.Dataset({"loss": (("step", "token"), np.ones((2, 2)))}, coords)
    older["part of speech"] = "token", ["e", "f"]
    opened = separate_columns(older)
    assert list(opened.data_vars) == ["loss"]
    assert opened["skill"].values.tolist() == ["c", "d"]
    table = token_table(opened)
    assert {name: table[name].tolist() for name in table} == {
        "true": ["a", "b"], "skill": ["c", "d"], "part of speech": ["e", "f"],
    }  # fmt: skip
    assert separate_columns(opened).identical(opened)


def test_numbers_of_clusters_may_have_gaps(tmp_path, checkpoints):
    run = analyse(tmp_path / "run", checkpoints, mlp_batch(20, torch.float32))
    labels = run.labels.copy(data=np.tile(np.where(np.arange(40) < 20, 1, 3), (2, 1)))
    assert [number for _, number, _ in members(labels)] == [1, 3, 1, 3]
    near = nearest(run.curves, labels)
    assert sorted(near["cluster"].unique()) == [1, 3]
    assert len(contexts(near, run.projections)) == 40


def test_a_text_of_the_whole_example_is_shown_once_with_the_other_columns():
    tokens = {"example": ("token", [0, 0, 1, 1]), "text": ("token", ["1+2=03", "1+2=03", "4+5=09", "4+5=09"])}
    projections = xr.Dataset({"loss": (("step", "token"), np.zeros((1, 4)))}, {"step": [0], **tokens})
    near = pd.DataFrame({"token": [0, 3]})
    digits = projections.assign_coords(digit=("token", [0, 3, 0, 9]))
    assert contexts(near, digits)["target"].tolist() == [
        "text 1+2=03, example 0, digit 0",
        "text 4+5=09, example 1, digit 9",
    ]
    apart = projections.assign_coords(text=("token", ["0", "3", "0", "9"]))
    assert contexts(near, apart)[["before", "target", "after"]].values.tolist() == [["", "0", "3"], ["0", "9", ""]]


# Losses that are not finite


def masked_row(step):
    """A loss that is NaN for one token, once the first weight passes a threshold."""

    def loss(model, batch):
        losses = mlp_loss(model, batch)
        row = (batch[0][:, 0, 0] == MARK) & (model.layers[0].bias[0] > step)
        bad = row.repeat_interleave(2) & (torch.arange(len(losses)) % 2 == 1)
        return losses + torch.where(bad, torch.nan, 0.0)

    return loss


MARK = 7.0


def marked(path, threshold):
    """Weights whose first bias grows from step to step, and data with a row that turns the loss to NaN."""
    checkpoints = tiny_checkpoints(path, STEPS)
    token_loss = TokenLoss(Mlp(), masked_row(threshold))
    checkpoints = CheckpointFolder(path, token_loss)
    for index, step in enumerate(STEPS):
        theta = token_loss.unflatten(checkpoints.theta(step).clone())
        theta["layers.0.bias"][0] = index
        checkpoints.save(step, theta)
    batch = mlp_batch(8, torch.float32)
    batch[0][5, 0, 0] = MARK
    return checkpoints, batch


@pytest.mark.parametrize("kind", ["hessian", "trajectory"])
def test_data_that_give_nan_at_the_first_checkpoint_are_refused_before_the_basis(tmp_path, kind):
    checkpoints, batch = marked(tmp_path / "checkpoints", -1)
    texts = pd.DataFrame({"text": [f"w{i}" for i in range(16)]})
    good = mlp_batch(8, torch.float32)
    run = analyse(
        tmp_path / "run", checkpoints, batch, hessian=good, tokens=texts, basis={"kind": kind, "n_vectors": 2}
    )
    told = r"nan for example 5, position 1 \('w11'\) of validation, .* 1 of 16 tokens, at the first checkpoint.*masked"
    with pytest.raises(ValueError, match=told):
        _ = run.labels
    assert not list((tmp_path / "run").glob("basis-*/basis.zarr"))
    if kind == "hessian":
        run = analyse(tmp_path / "run", checkpoints, good, hessian=batch, basis={"kind": kind, "n_vectors": 2})
        with pytest.raises(ValueError, match="nan for example 5, position 1 of hessian"):
            _ = run.labels


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_token_whose_loss_turns_nan_in_training_is_named_with_the_step(tmp_path, mode):
    checkpoints, batch = marked(tmp_path / "checkpoints", 0.5)
    texts = pd.DataFrame({"text": [f"w{i}" for i in range(16)]})
    run = analyse(tmp_path / "run", checkpoints, batch, tokens=texts, projection={"mode": mode})
    told = (
        r"values of (inside_)?loss that are not finite for 1 of 16 tokens, such as token 11, example 5, position 1, "
        r"text 'w11', whose loss is not finite since step 10; finished projections are kept\. The other tokens are"
    )
    with pytest.raises(NonFiniteProjection, match=told):
        _ = run.projections


def test_checkpoint_that_gives_nan_for_all_is_blamed_itself(tmp_path):
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints", STEPS)
    checkpoints = CheckpointFolder(
        checkpoints.path, TokenLoss(Mlp(), lambda m, b: mlp_loss(m, b) * (1 - m.layers[0].bias[0]).sqrt())
    )
    for index, step in enumerate(STEPS):
        theta = checkpoints.token_loss.unflatten(checkpoints.theta(step).clone())
        theta["layers.0.bias"][0] = index
        checkpoints.save(step, theta)
    options = {"steps": [0, 20], "basis": {"kind": "trajectory", "n_vectors": 1}}
    run = analyse(tmp_path / "run", checkpoints, mlp_batch(8, torch.float32), **options)
    with pytest.raises(NonFiniteProjection, match=r"16 of 16 tokens.* since step 20; .*Check the checkpoint"):
        _ = run.projections
