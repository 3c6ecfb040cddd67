"""The page about a run: what it says, for any run, and that nothing a corpus holds is read as HTML."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from polca_lib.method.clustering import DROPPED, OUTLIER
from polca_lib.method.decomposition import projected_loss
from polca_lib.method.settings import ClusteringSettings
from polca_lib.report.findings import Findings
from polca_lib.report.page import explorer, write_report

SETTINGS = ClusteringSettings(order="first", scaling="raw", min_cluster_size=5, breakthrough_window=20)
PROVENANCE = pd.DataFrame({"value": {"seed": "0", "device": "cpu"}})
LONG = "x" * 10_000_000
HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 2</script>", "<!--", "]]>",
    "&lt;b&gt;&#x3c;",
    "\"' onmouseover=window.hacked=3 x='", "<img src=x onerror=window.hacked=4>", "javascript:window.hacked=5",
    "\u202egnirts desrever", "\u2067isolate", "\x00\x07\x1b[31m", "$x^2$ \\(y\\)", "{{ 7 * 7 }}{% raw %}",
    "<svg/onload=window.hacked=6>", "%{y} <a href='javascript:window.hacked=7'>click</a>", LONG,
]  # fmt: skip


def made(tokens=40, vectors=2, steps=(0, 10, 20, 30, 40, 50, 60), **columns):
    """Projections of which the first half of the tokens drops early, the second half late, and their clusters."""
    steps, half = np.array(steps), tokens // 2
    late = np.arange(tokens) >= half
    middle = steps[len(steps) // 2]
    moves = np.where(late[None, :], steps[:, None] >= middle, steps[:, None] < middle).astype(float)
    gradient = np.repeat((-moves * (1 + np.arange(tokens) / 100))[:, :, None], vectors, axis=2)
    movement = np.ones((len(steps), vectors))
    movement[-1] = np.nan
    loss = 3 + np.concatenate([np.zeros((1, tokens)), np.cumsum(gradient.sum(axis=2)[:-1], axis=0)]) * 0.5
    coords = {"step": steps, "token": np.arange(tokens), "vector": np.arange(1, vectors + 1)}
    coords |= {name: ("token", values) for name, values in columns.items()}
    projections = xr.Dataset(
        {
            "loss": (("step", "token"), loss),
            "gradient": (("step", "token", "vector"), gradient),
            "movement": (("step", "vector"), movement),
            "distance": ("step", np.where(np.isnan(movement[:, 0]), np.nan, 2.0)),
            "inside_loss": (("step", "token"), np.concatenate([loss[1:], np.full((1, tokens), np.nan)])),
        },
        coords=coords,
    )
    labels = xr.full_like(projections["gradient"].isel(step=0, drop=True), OUTLIER, dtype=int)
    labels = labels.transpose("vector", "token")
    labels[0] = np.where(late, 2, 1)
    labels[-1] = DROPPED if vectors > 1 else labels[0]
    return projections, labels


def text(tokens=40):
    words = [["early", "soon", "at once"][i % 3] if i < tokens // 2 else "late" for i in range(tokens)]
    return {"text": [f" {w}" for w in words], "example": np.arange(tokens) // 10, "position": np.arange(tokens) % 10}


def found(projections, labels, hidden_after=None):
    return Findings(projections, projected_loss(projections, SETTINGS.order), labels, SETTINGS, hidden_after)


def written(tmp_path, *made, title="A run"):
    return write_report(tmp_path / "report.html", found(*made), title=title, provenance=PROVENANCE).read_text("utf-8")


def visible(page):
    """What stands in the tables, without scripts."""
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)


def test_summary_counts_what_there_is():
    projections, labels = made(**text())
    told = found(projections, labels, 25).summary()
    json.dumps(told, allow_nan=False)
    assert (told["tokens"], told["vectors"], told["checkpoints"]) == (40, 2, 7)
    assert (told["clusters"], told["vectors_with_clusters"], told["vectors_falling"]) == (2, 1, 2)
    assert told["claimed"] == pytest.approx(2)  # of two vectors each claims the whole, and the loss halves that
    assert told["inside"] == pytest.approx(1)
    first, second = told["breakthroughs"]
    assert (first["cluster"], first["hidden"], first["breakthrough"]) == (2, True, 30)
    assert (second["cluster"], second["hidden"]) == (1, False)
    assert first["label"] == "“late”, 100% of the cluster, nowhere else"
    assert second["label"] == "“early” or “soon”, 70% of the cluster, nowhere else"
    # The change in loss parts the same two halves.
    assert (first["told_by_loss"], second["told_by_loss"]) == (1, 1)
    assert first["made_of"] == "' late' 100%"
    assert "' early' 35%" in second["made_of"]


def test_summary_and_page_tell_the_kind_whose_loss_the_checkpoints_see_least_of(tmp_path):
    projections, labels = made(**text())
    steep = np.interp(projections["step"], [0, 10, 20, 60], [3, 2.9, 0.2, 0])
    late = np.arange(40) >= 20
    projections["loss"][:, late] = steep[:, None] + np.zeros((1, 20))
    told = found(projections, labels).summary()
    assert told["checkpoints_fit"] is False
    assert told["largest_share_between_checkpoints"] == pytest.approx(0.9)
    assert told["checkpoints_advice"].startswith(
        "not fit for POLCA: “late” makes 90% of its loss drop between steps 10"
    )
    page = visible(written(tmp_path, projections, labels))
    assert "Not fit for POLCA: “late” makes 90% of its loss drop between steps 10 and 20" in page
    assert re.search(r"“late”</bdi></td><td class=\"n\">20</td><td class=\"n\">3</td><td class=\"n\">90%</td>", page)
    assert "all tokens" in page


def test_run_whose_loss_never_falls_is_not_judged():
    projections, labels = made(**text())
    told = found(projections.assign(loss=projections["loss"] * 0 + 1), labels).summary()
    assert (told["checkpoints_fit"], told["largest_share_between_checkpoints"]) == (False, None)
    assert told["checkpoints_advice"].startswith("not judged")


def test_page_shows_the_numbers_and_hidden_clusters_first(tmp_path):
    page = visible(written(tmp_path, *made(**text()), 25))
    assert "A run" in page
    assert page.index("&#39; late&#39; 100%") < page.index("&#39; early&#39; 35%")
    assert page.count('class="hidden-one"') == 1
    assert "add up to 2 of the true change" in page
    assert "That is far from 1" in page


def test_a_cluster_that_the_change_in_loss_does_not_tell_is_compared_with_the_most_similar_one():
    projections, labels = made(**text())
    labels[0] = np.where(np.arange(40) % 2, 1, 2)
    assert found(projections, labels).clusters["told_by_loss"].tolist() == [0.5, 0.5]
    flat = projections.assign(loss=projections["loss"] * 0 + 1)
    assert found(flat, labels).loss_clusters.max() < 2


def test_column_that_sets_a_cluster_apart_says_what_it_is_made_of():
    columns = {"parity": np.arange(40) % 2, "late": np.arange(40) >= 20, "number": np.arange(40) * 1.5 + 7}
    clusters = found(*made(tokens=40, **columns), 25).clusters
    assert clusters["made_of"].tolist() == ["late: 'True' 100%", "late: 'False' 100%"]


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"vectors": 1}, "have clusters"),
        ({"steps": (0, 10)}, "Breakthroughs"),
        ({"steps": (0, 1, 2, 4, 8, 16, 32, 64, 128)}, "0 to 128"),
        ({"tokens": 3000}, "3,000"),
    ],
)
def test_any_run_has_a_page(tmp_path, shape, told):
    assert told in visible(written(tmp_path, *made(**shape)))


def test_breakthroughs_that_are_left_out_are_told_with_the_reason():
    projections, labels = made(steps=(0, 10), **text())
    with pytest.warns(UserWarning, match=r"breakthroughs are left out: clustering\.breakthrough_window = .* steps of"):
        table = found(projections, labels).clusters
    assert table["breakthrough"].isna().all()


def test_run_without_clusters_says_so(tmp_path):
    projections, labels = made(**text())
    none = xr.full_like(labels, OUTLIER)
    assert "HDBSCAN found no cluster along any direction" in visible(written(tmp_path, projections, none))
    assert found(projections, none).summary()["breakthroughs"] == []


def test_run_without_the_loss_inside_has_a_page(tmp_path):
    projections, labels = made(**text())
    page = visible(written(tmp_path, projections.drop_vars("inside_loss"), labels))
    assert "movement inside the basis" not in page


def test_contexts_stay_within_their_example():
    projections, labels = made(**text())
    shown = explorer(found(projections, labels))._data["vectors"]
    contexts = [context for vector in shown for cluster in vector["clusters"] for context in cluster["contexts"]]
    assert len(contexts) == 20
    for context in contexts:
        whole = context.get("before", "") + context["target"] + context.get("after", "")
        assert len(whole.replace("at once", "at_once").split()) <= 10


def hostile():
    """A corpus of tokens that no page may take for anything but text."""
    words = [HOSTILE[i % len(HOSTILE)] for i in range(40)]
    columns = {**text(), "text": words, "<i>kind</i>": [HOSTILE[i % 8] for i in range(40)]}
    columns["text"] = np.array(words, dtype=object)
    return made(**columns)


@pytest.fixture
def page(browser):
    """A page, what it asks for and what it has to say."""
    page = browser.new_context(viewport={"width": 1100, "height": 900}).new_page()
    page.asked, page.told = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("dialog", lambda dialog: (page.told.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    yield page
    page.context.close()


@pytest.mark.slow
def test_text_of_a_corpus_is_never_read_as_html(tmp_path, page):
    file, title = tmp_path / "report.html", "<script>window.hacked = 8</script>\u202e title"
    projections, labels = hostile()
    write_report(file, found(projections, labels, 25), title=title, provenance=PROVENANCE)
    assert file.stat().st_size < 8_000_000  # a token of 10 MB is cut
    page.goto(file.as_uri())
    page.wait_for_selector(".polca-chip")
    scripts = page.evaluate("document.querySelectorAll('script').length")
    read = page.inner_text("body")
    for chip in page.query_selector_all(".polca-chip"):
        chip.click()
        read += page.inner_text("body")
    assert page.evaluate("window.hacked") is None
    assert (
        page.evaluate("document.querySelectorAll('script').length") == scripts == 6
    )  # plotly, three figures, two of the explorer
    assert page.evaluate("document.querySelectorAll('img, iframe, a[href^=javascript]').length") == 0
    assert page.asked == [file.as_uri()]
    assert page.told == []
    assert "<script>window.hacked = 8</script>" in page.inner_text("h1")
    for word in HOSTILE[:8]:
        assert word in read, word
    assert "{{ 7 * 7 }}{% raw %}" in read
    assert "(10,000,000 characters)" in read
    assert "<i>kind</i>" in read
    # Text that runs from right to left does so within its own element alone.
    assert page.evaluate("getComputedStyle(document.querySelector('h1 bdi')).unicodeBidi") == "isolate"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_both_schemes(tmp_path, browser, scheme):
    file = tmp_path / "report.html"
    projections, labels = made(**text())
    write_report(file, found(projections, labels, 25), title="A run", provenance=PROVENANCE)
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector(".polca-chip")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert (bright[0] > bright[1]) == (scheme == "light")
    assert len(page.query_selector_all(".js-plotly-plot")) >= 3
    context.close()
