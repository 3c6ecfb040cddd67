import numpy as np
import pandas as pd
import pytest
from polca_paper import fit, verdicts

PRINTED = fit.printed_numbers()


@pytest.fixture(scope="module")
def ours():
    """Numbers of thirty readings by chance, of which reading 7 gives what is printed."""
    rng = np.random.default_rng(0)
    middle = PRINTED[["low", "high"]].mean(axis=1).to_numpy()
    values = middle * rng.uniform(0.2, 1.8, (30, len(PRINTED)))
    values[7] = middle
    return pd.DataFrame(values, columns=PRINTED["number"])


def test_printed_f1_follows_from_printed_homogeneity_and_recall():
    values = PRINTED.set_index("number")["printed"]
    for number in PRINTED.loc[PRINTED["measure"] == "f1", "number"]:
        purity, recall = (values[number.replace("f1", measure)] for measure in ("homogeneity", "recall"))
        assert values[number] == pytest.approx(2 * purity * recall / (purity + recall), abs=0.0011), number


def test_every_printed_number_has_one_place_in_the_fit():
    assert PRINTED["number"].is_unique
    assert set(PRINTED["half"]) == {"A", "B", "follows"}
    assert (PRINTED["half"] == "follows").equals(PRINTED["measure"] == "f1")
    assert (PRINTED["low"] <= PRINTED["high"]).all()
    given = PRINTED.dropna(subset="printed")
    assert given["printed"].equals(given["low"])


def test_readings_leave_out_what_means_nothing():
    table = fit.all_readings()
    assert not table.duplicated().any()
    assert not ((table["variant"] == "per interval") & (table["scaling"] == "unit")).any()
    assert (table == pd.Series(fit.PLAIN_TEXT)).all(axis=1).sum() == 1


def test_errors_are_squares_of_tolerances_up_to_three():
    printed = PRINTED[PRINTED["number"].isin(["POLCA: homogeneity 1", "POLCA: clusters", "second order: L2"])]
    columns = {
        "POLCA: homogeneity 1": [0.973, 0.923, 0.5, np.inf, np.nan],
        "POLCA: clusters": [60, 100 * 1.25, 1000, 0, np.nan],
        "second order: L2": [5.4891e-4, 5.4891e-4 * 10**0.5, 1, np.inf, np.nan],
    }
    table = fit.errors(pd.DataFrame(columns), printed)
    for column in table.T:
        assert column == pytest.approx([0, 1 / 9, 1, 1, np.nan], abs=2e-4, nan_ok=True)


def test_each_group_counts_the_same_and_what_was_not_run_counts_nothing():
    printed = pd.DataFrame({"half": ["A", "A", "B", "B", "follows"], "group": ["a", "a", "b", "c", "a"]})
    errors = np.array([[0.2, 0.4, 1, np.nan, 1], [0.0, np.nan, 0.5, 0.5, 1]])
    assert fit.distance(errors, printed) == pytest.approx([(0.3 + 1) / 2, 1 / 3])
    assert fit.distance(errors, printed, "A") == pytest.approx([0.3, 0])
    assert fit.distance(errors, printed, "B") == pytest.approx([1, 0.5])


def test_the_reading_that_gives_the_printed_numbers_is_found_on_either_half(ours):
    readings = fit.all_readings().head(len(ours))
    scored = fit.score(readings, ours, PRINTED)
    assert scored.index[0] == 7
    assert scored.iloc[0]["distance"] == pytest.approx(0, abs=1e-12)
    assert scored.iloc[0]["within"] == scored.iloc[0]["run"] == (PRINTED["half"] != "follows").sum()
    checked = fit.cross_check(scored)
    assert checked["chosen"].tolist() == [7, 7]
    assert checked["beaten_by"].tolist() == [0, 0]
    assert (fit.without_each_group(readings, ours, PRINTED)["distance"] < 1e-9).all()


def test_shuffled_numbers_are_fitted_worse(ours):
    shuffled = fit.shuffled_printed(ours, PRINTED, draws=50)
    assert shuffled.min() > 0.05
    assert (shuffled == fit.shuffled_printed(ours, PRINTED, draws=50)).all()
    assert (shuffled != fit.shuffled_printed(ours, PRINTED, draws=50, seed=1)).any()


class Kept:
    """A kept study of some kinds of curves."""

    def __init__(self, name, **tables):
        self.name, self.tables = name, tables

    def has(self, name):
        return name in self.tables

    def table(self, name):
        return self.tables[name].assign(study=self.name)


def clustering(source, order, value, scaling="raw", variant="plain", rule="v1", **more):
    key = (source, order, scaling, "kept/15", "eom", variant)
    measures = {f"{m} {r}": value for m in ("homogeneity", "recall", "f1") for r in (1, 2, 3)}
    measures |= {"clusters": 5, "hidden": value, "dropped": value, "vector 2": value, "vector 3": value}
    return {**dict(zip(fit.CLUSTERED, key, strict=True)), "rule": rule, **measures, **more}


def reading(**choices):
    return pd.DataFrame([{**fit.PLAIN_TEXT, "order": "second", "rule": "v1", **choices}])


def test_numbers_are_taken_from_the_clustering_that_a_reading_means():
    rows = [
        clustering("POLCA", "second", 0.9),
        clustering("POLCA", "first", 0.8),
        clustering("POLCA", "first", 0.85, "unit"),
        clustering("exact loss", np.nan, 0.5),
        clustering("exact loss", np.nan, 0.55, "unit"),
        clustering("change in loss", np.nan, 0.6, variant="per interval"),
        clustering("change in loss", np.nan, 0.65, "unit"),
    ]
    study = Kept("a", clusterings=pd.DataFrame(rows))
    names = [f"{source}: homogeneity 1" for source in ("POLCA", "POLCA first", "exact loss", "change in loss")]
    plain = fit.numbers(reading(), [study])
    assert plain[names].iloc[0].tolist() == [0.9, 0.8, 0.5, 0.6]
    scaled = fit.numbers(reading(order="first", scaling="unit", baselines="scaled"), [study])
    assert scaled[names].iloc[0].tolist() == [0.85, 0.85, 0.55, 0.65]
    mixed = fit.numbers(reading(order="first", scaling="unit", baselines="loss raw"), [study])
    assert mixed[names].iloc[0].tolist() == [0.85, 0.85, 0.5, 0.65]


def test_not_run_is_nan_and_without_clusters_is_missed():
    study = Kept("a", clusterings=pd.DataFrame([clustering("POLCA", "first", 0.8)]))
    numbers = fit.numbers(reading(order="first", min_samples="kept/30"), [study]).iloc[0]
    assert np.isinf(numbers["POLCA: homogeneity 1"])
    assert numbers["POLCA: clusters"] == 0
    assert np.isnan(numbers["random: homogeneity 1"])
    assert np.isnan(fit.numbers(reading(), [study]).iloc[0]["POLCA: homogeneity 1"])


def test_a_kind_of_curve_is_taken_from_the_first_study_that_has_it():
    one = Kept("a", clusterings=pd.DataFrame([clustering("POLCA", "first", 0.8)]))
    two = Kept("b", clusterings=pd.DataFrame([clustering("POLCA", "first", 0.1), clustering("random", "first", 0.7)]))
    numbers = fit.numbers(reading(order="first"), [one, two]).iloc[0]
    assert (numbers["POLCA: homogeneity 1"], numbers["random: homogeneity 1"]) == (0.8, 0.7)


def test_first_order_stands_for_second_summed_only_where_none_has_it():
    rows = [clustering("POLCA", "first", 0.8), clustering("POLCA", fit.SUMMED, 0.7), clustering("random", "first", 0.6)]
    one = Kept("a", clusterings=pd.DataFrame(rows))
    two = Kept("b", clusterings=pd.DataFrame([clustering("shuffled", "trapezoid", 0.5)]))
    numbers = fit.numbers(reading(order=fit.SUMMED), [one, two]).iloc[0]
    assert (numbers["POLCA: homogeneity 1"], numbers["random: homogeneity 1"]) == (0.7, 0.6)
    assert np.isnan(numbers["shuffled: homogeneity 1"])
    assert np.isnan(fit.numbers(reading(order="second"), [one, two]).iloc[0]["random: homogeneity 1"])


def test_second_order_numbers_come_from_the_finest_cadence():
    rows = [("second", 20, 0.7, 6), ("second", 100, 0.1, 9), ("trapezoid", 20, 0.9, 3)]
    agreement = pd.DataFrame(rows, columns=["order", "cadence", "cosine", "l2"])
    term = pd.DataFrame({"term": ["second"], "rmse": [0.01]})
    study = Kept(
        "a", clusterings=pd.DataFrame([clustering("POLCA", "second", 0.8)]), agreement=agreement, second_order_term=term
    )
    names = [f"second order: {name}" for name in ("1 - cosine", "L2", "RMSE of the term")]
    assert fit.numbers(reading(), [study]).iloc[0][names].tolist() == pytest.approx([0.3, 6, 0.01])
    assert np.isinf(fit.numbers(reading(order="first"), [study]).iloc[0][names].astype(float)).all()


def test_a_reading_of_which_less_was_run_has_no_distance_and_stands_last():
    study = Kept(
        "a", clusterings=pd.DataFrame([clustering("POLCA", "first", 0.2), clustering("exact loss", np.nan, 0.514)])
    )
    readings = pd.concat([reading(), reading(order="first")], ignore_index=True)
    scored = fit.score(readings, fit.numbers(readings, [study]), fit.printed_numbers())
    assert scored["order"].tolist() == ["first", "second"]
    assert scored["distance"].notna().tolist() == [True, False]


def test_a_clustering_of_a_reading_is_found_or_empty_or_not_run():
    study = Kept(
        "a", clusterings=pd.DataFrame([clustering("POLCA", "first", 0.8), clustering("exact loss", np.nan, 0.5)])
    )
    found = dict(reading(order="first").iloc[0])
    assert fit.clustering_of(found, [study], "POLCA")["homogeneity 1"] == 0.8
    assert fit.clustering_of(found, [study], "exact loss")["clusters"] == 5
    assert fit.clustering_of({**found, "scaling": "unit"}, [study], "POLCA")["clusters"] == 0
    assert fit.clustering_of(found, [study], "random") is None


def test_kept_readings_are_the_closest_their_neighbours_and_the_plain_text():
    rows = [
        clustering("POLCA", order, value, scaling)
        for order in ("first", fit.SUMMED) for scaling, value in (("raw", 0.2), ("unit", 0.9))
    ]  # fmt: skip
    study = Kept("a", clusterings=pd.DataFrame(rows))
    scored, ours = verdicts.scored_readings([study])
    table = verdicts.kept_readings(scored, ours, closest=3)
    choices = list(fit.CHOICES)
    chosen = table.drop_duplicates(choices)
    assert len(table) == len(chosen) * len(fit.printed_numbers())
    assert (chosen[choices] == pd.Series(fit.PLAIN_TEXT)).all(axis=1).sum() == 1
    assert verdicts.reading_of(scored.iloc[0]) == dict(chosen.iloc[0][choices])
    differ = (chosen[choices] != chosen.iloc[0][choices]).sum(axis=1)
    assert (differ == 1).sum() > 3
    row = table[table["number"] == "POLCA: homogeneity 1"].iloc[0]
    assert (row["printed"], row["ours"]) == (0.973, 0.9)
