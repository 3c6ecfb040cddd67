"""The explorer: its data in plain Python, its behaviour in a headless browser without a network."""

import contextlib
import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from cases import sigmoid_drop
from plotly.offline import get_plotlyjs

from polca_lib.report.explorer import PLOTLY_FILE, Explorer

pytestmark = pytest.mark.slow

STEPS = np.arange(0, 601, 10)
SIZES = {1: [240, 96, 31], 2: [410, 120], 3: []}
LABELS = ("PUNCT after PROPN", "subword inside a name", "DET after ADP", "NOUN after ADJ")
WORDS = {1: " harbour", 2: "\n", 3: ",", 4: " 1974"}
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1> &lt;b&gt; \u202eabc\u202c שלום\u2028end"


def tables(sizes=SIZES, contexts=6):
    """A made-up run: a summary with curves of single tokens, clusters, and contexts."""
    vectors, most = list(sizes), max(max(map(len, sizes.values())), 1)
    found = {name: np.full((len(vectors), most, len(STEPS)), np.nan) for name in ("medoid", "low", "high", "loss")}
    nearest = np.full((len(vectors), most, 3, len(STEPS)), np.nan)
    clusters, texts = [], []
    for row, (vector, tokens) in enumerate(sizes.items()):
        for column, size in enumerate(tokens):
            number, centre = column + 1, 120 + 130 * column + 40 * row
            drop = (-1) ** (column == 2) * (3 - 0.8 * column) * (sigmoid_drop(STEPS, centre) - 1)
            found["medoid"][row, column] = drop
            found["low"][row, column], found["high"][row, column] = 1.25 * drop - 0.05, 0.75 * drop + 0.05
            found["loss"][row, column] = 6 - number + 3 * sigmoid_drop(STEPS, centre)
            nearest[row, column] = drop + np.array([[0.12], [-0.1], [0.2]])
            clusters.append(
                {
                    "vector": vector, "cluster": number, "tokens": size, "label": LABELS[column % 4],
                    "simple": column != 1, "mirrors": {0: "3", 2: "1"}.get(column, "") if len(tokens) > 2 else None,
                    "inside": 0.87123456 - 0.1 * column, "outside": 0.1234, "precision": 0.9, "recall": np.nan,
                }
            )  # fmt: skip
            texts += [
                {
                    "vector": vector, "cluster": number, "rank": rank,
                    "before": f"({vector}.{number}.{rank}) The town lies on the eastern shore of the lake, by the old",
                    "target": WORDS[column % 4 + 1], "after": " of the county, which was rebuilt after the war",
                    "title": "Lake Constance", "url": "https://example.org/wiki/Lake?a=1&b=2",
                    "attribution": "Wikipedia, CC BY-SA 4.0",
                }
                for rank in range(1, contexts + 1)
            ]  # fmt: skip
    summary = xr.Dataset(
        {
            **{name: (("vector", "cluster", "step"), values) for name, values in found.items()},
            "nearest": (("vector", "cluster", "rank", "step"), nearest),
        },
        coords={
            "vector": vectors, "cluster": np.arange(1, most + 1), "rank": [1, 2, 3], "step": STEPS,
            "birth_step": ("vector", [np.nan if vector == 0 else 100.0 * vector for vector in vectors]),
        },
    )  # fmt: skip
    if not clusters:
        clusters = pd.DataFrame(columns=["vector", "cluster", "tokens", "label", "simple"])
        texts = pd.DataFrame(columns=["vector", "cluster", "rank", "before", "target", "after"])
    return summary, pd.DataFrame(clusters), pd.DataFrame(texts)


def explorer(sizes=SIZES, **options):
    return Explorer(
        *tables(sizes), title="Clusters along the basis", note="A made-up run.", hidden_after=300, **options
    )


def data_of(fragment):
    return re.search(r'<script type="application/json">(.*?)</script>', fragment, re.DOTALL)[1]


# ------------------------------------------------------------------------------------------------------------ the data


def test_data_hold_what_the_tables_say_to_four_digits():
    summary, clusters, contexts = tables()
    data = json.loads(data_of(Explorer(summary, clusters, contexts, title="t", hidden_after=300)._repr_html_()))
    assert data["steps"] == STEPS.tolist()
    assert data["hiddenAfter"] == 300
    assert [len(one["clusters"]) for one in data["vectors"]] == [3, 2, 0]
    assert [one["birth"] for one in data["vectors"]] == [100, 200, 300]
    second = data["vectors"][0]["clusters"][1]
    assert (second["label"], second["tokens"], second["simple"]) == (LABELS[1], 96, False)
    assert second["measures"] == [0.7712, 0.1234, 0.9, None]
    own = summary.sel(vector=1, cluster=2)
    for name in ("medoid", "low", "high", "loss"):
        np.testing.assert_allclose(second[name], own[name], rtol=5e-4)
        assert max(len(re.sub(r"e.*|\D|^0\.0*", "", str(value)).lstrip("0")) for value in second[name]) <= 4
    np.testing.assert_allclose(second["nearest"][2]["values"], own["nearest"].sel(rank=3), rtol=5e-4)
    assert [text["rank"] for text in second["contexts"]] == [1, 2, 3, 4, 5, 6]


def test_contexts_come_nearest_first_and_gaps_are_left_out():
    summary, clusters, contexts = tables()
    contexts = contexts[::-1].assign(title=None, url=np.nan).drop(columns="attribution")
    fragment = Explorer(summary, clusters, contexts, title="t")._repr_html_()
    first = json.loads(data_of(fragment))["vectors"][0]["clusters"][0]["contexts"]
    assert [text["rank"] for text in first] == [1, 2, 3, 4, 5, 6]
    assert set(first[0]) == {"rank", "before", "target", "after"}


def test_nothing_in_the_data_can_end_their_script_element():
    summary, clusters, contexts = tables()
    clusters["label"], contexts["before"] = "</script><!--", HOSTILE
    text = data_of(Explorer(summary, clusters, contexts, title="</script>")._repr_html_())
    assert not re.search("[<>&\u2028\u2029]", text)
    data = json.loads(text)
    assert data["title"] == "</script>"
    assert data["vectors"][0]["clusters"][0]["contexts"][0]["before"] == HOSTILE


def test_a_large_run_stays_under_a_megabyte():
    fragment = explorer({vector: [90] * 6 for vector in range(1, 31)})._repr_html_()
    assert len(fragment) < 1_000_000


def test_the_fragment_is_the_same_each_time_and_the_document_escapes_its_title(tmp_path):
    assert explorer()._repr_html_() == explorer()._repr_html_()
    written = Explorer(*tables(), title="a < b & c").write(tmp_path / "one.html")
    assert written == tmp_path / "one.html"
    assert "<title>a &lt; b &amp; c</title>" in written.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["medoid", "low", "high", "loss"])
def test_a_missing_variable_is_named(name):
    summary, clusters, contexts = tables()
    with pytest.raises(ValueError, match=f"no variable '{name}'"):
        Explorer(summary.drop_vars(name), clusters, contexts, title="t")


def test_missing_dimensions_and_coordinates_are_named():
    summary, clusters, contexts = tables()
    with pytest.raises(ValueError, match=r"'loss'.*dimensions"):
        Explorer(summary.assign(loss=summary["loss"].sel(vector=1)), clusters, contexts, title="t")
    with pytest.raises(ValueError, match="coordinate 'step'"):
        Explorer(summary.drop_vars("step"), clusters, contexts, title="t")


def test_missing_columns_are_named():
    summary, clusters, contexts = tables()
    with pytest.raises(ValueError, match="clusters has no column label, simple"):
        Explorer(summary, clusters.drop(columns=["label", "simple"]), contexts, title="t")
    with pytest.raises(ValueError, match="contexts has no column target"):
        Explorer(summary, clusters, contexts.drop(columns="target"), title="t")


def test_clusters_of_one_table_alone_are_named():
    summary, clusters, contexts = tables()
    last = (clusters["vector"] == 2) & (clusters["cluster"] == 2)
    with pytest.raises(ValueError, match="vector 2, cluster 2 has curves in summary, but no row"):
        Explorer(summary, clusters[~last], contexts, title="t")
    with pytest.raises(ValueError, match="vector 2, cluster 2 has a row in clusters, but no curve"):
        Explorer(summary.where((summary["vector"] != 2) | (summary["cluster"] != 2)), clusters, contexts, title="t")
    with pytest.raises(ValueError, match="vector 3, cluster 9 has contexts, but no row"):
        Explorer(summary, clusters, pd.concat([contexts, contexts[:1].assign(vector=3, cluster=9)]), title="t")
    with pytest.raises(ValueError, match="vector 2, cluster 2 has more than one row"):
        Explorer(summary, pd.concat([clusters, clusters[last]]), contexts, title="t")


# ---------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture
def visit(browser, tmp_path):
    """Open HTML (or a file) in a window of its own; an error, or a request for what is no file, fails the test."""
    problems = []
    with contextlib.ExitStack() as stack:

        def visit(page_or_path, *, allow=(), plots=True, **options):
            options = {"viewport": {"width": 1100, "height": 1000}, "reduced_motion": "reduce"} | options
            context = stack.enter_context(browser.new_context(**options))
            page = context.new_page()

            def route(request):
                if request.request.url.startswith("file:"):
                    return request.continue_()
                if not request.request.url.startswith(allow):
                    problems.append(f"request for {request.request.url}")
                return request.abort()

            page.route("**/*", route)
            page.on("pageerror", lambda error: problems.append(f"error: {error}"))
            page.on("console", lambda said: said.type in ("error", "warning") and problems.append(said.text))
            path = page_or_path
            if isinstance(page_or_path, str):
                path = tmp_path / "page.html"
                path.write_text(page_or_path, encoding="utf-8")
            page.goto(path.as_uri())
            if plots:
                page.wait_for_function(DRAWN)
            return page

        visit.problems = problems
        yield visit
    assert problems == []


DRAWN = "() => [...document.querySelectorAll('.polca-plot')].every(one => one.querySelector('.scatterlayer .trace'))"
POINT = """([side, meta, index]) => {
  const plot = document.querySelectorAll('.polca-plot')[side], {xaxis, yaxis} = plot._fullLayout;
  const curves = plot.data.filter(one => one.hoverinfo !== 'skip');
  const trace = curves.find(one => one.meta.cluster === meta[0] && one.meta.rank === meta[1]);
  const box = plot.getBoundingClientRect();
  return [box.x + xaxis._offset + xaxis.d2p(trace.x[index]), box.y + yaxis._offset + yaxis.d2p(trace.y[index])];
}"""


def point(page, cluster, *, rank=None, side=0, index=50):
    """Where a point of a curve is, in pixels of the window."""
    return page.evaluate(POINT, [side, [cluster, *([rank] if rank else [])], index])


def click(page, cluster, *, rank=None, side=0):
    """Click a curve once the pointer is seen to be on it, which Plotly reports late on a busy machine."""
    place = point(page, cluster, rank=rank, side=side)
    page.mouse.move(*place)
    here = (
        "([side, meta]) => (document.querySelectorAll('.polca-plot')[side]._hoverdata ?? [])"
        ".some(({ data }) => data.meta.cluster === meta[0] && data.meta.rank === meta[1])"
    )
    page.wait_for_function(here, arg=[side, [cluster, *([rank] if rank else [])]])
    page.mouse.click(*place)


def shown(page):
    """Vector, cluster and rank of the contexts that can be read, as the texts themselves say."""
    return re.findall(r"\((\d)\.(\d)\.(\d)\)", page.locator(".polca-contexts").first.inner_text())


def state(page, nth=0):
    root = page.locator(".polca-explorer").nth(nth)
    return root.get_attribute("data-vector"), root.get_attribute("data-cluster")


def html_page(*fragments, root="<html>"):
    body = "\n".join(fragments)
    return f"<!DOCTYPE html>{root}<head><meta charset=utf-8></head><body>{body}</body></html>"


def lines_of(page, side=0):
    return page.evaluate(
        "side => document.querySelectorAll('.polca-plot')[side].data.filter(t => t.meta.rank === undefined"
        " && t.hoverinfo !== 'skip').map(t => [t.meta.cluster, t.line.color, t.y.at(-1)])",
        side,
    )


def test_a_click_on_a_chip_shows_its_contexts(visit):
    page = visit(explorer().to_html())
    assert state(page) == ("1", "1")
    assert shown(page) == [("1", "1", f"{rank}") for rank in range(1, 7)]
    assert page.locator(".polca-chip").count() == 3
    chip = page.locator(".polca-chip").nth(1)
    assert re.sub(r"\s+", " ", chip.inner_text()) == "2 subword inside a name 96"
    assert "mirrors 3" in page.locator(".polca-chip").first.inner_text()
    chip.click()
    assert state(page) == ("1", "2")
    assert shown(page) == [("1", "2", f"{rank}") for rank in range(1, 7)]
    assert chip.get_attribute("aria-checked") == "true"
    assert page.locator(".polca-contexts mark").first.inner_text() == "⏎"
    assert page.locator(".polca-measures").inner_text().split() == [
        "inside", "0.771", "outside", "0.123", "precision", "0.900", "recall", "-",
    ]  # fmt: skip


@pytest.mark.parametrize("side", [0, 1])
def test_a_click_on_a_curve_shows_the_contexts_of_its_cluster(visit, side):
    page = visit(explorer().to_html())
    click(page, 3, side=side)
    page.wait_for_selector(".polca-explorer[data-cluster='3']")
    assert {found[:2] for found in shown(page)} == {("1", "3")}


def test_a_click_on_a_token_marks_its_context(visit):
    page = visit(explorer().to_html())
    click(page, 1, rank=3)
    page.wait_for_selector(".polca-contexts [aria-current]")
    current = page.locator(".polca-contexts [aria-current]")
    assert current.count() == 1
    assert "(1.1.3)" in current.inner_text()
    assert state(page) == ("1", "1")
    page.mouse.move(*point(page, 1, rank=2))
    page.wait_for_selector(".polca-contexts [data-rank='2'][aria-current]")
    page.mouse.move(5, 5)
    page.wait_for_selector(".polca-contexts [data-rank='3'][aria-current]")


def test_a_curve_under_the_pointer_is_previewed_and_not_chosen(visit):
    page = visit(explorer().to_html())
    page.mouse.move(*point(page, 2))
    page.wait_for_function("document.querySelector('.polca-chosen').dataset.cluster === '2'")
    assert {found[:2] for found in shown(page)} == {("1", "2")}
    assert state(page) == ("1", "1")
    opacity = "cluster => document.querySelector('.polca-plot').data.filter(t => t.meta.cluster === cluster)[0].opacity"
    assert page.evaluate(opacity, 3) < page.evaluate(opacity, 2)
    page.mouse.move(5, 5)
    page.wait_for_function("document.querySelector('.polca-chosen').dataset.cluster === '1'")
    assert page.evaluate(opacity, 3) == page.evaluate(opacity, 2)


def test_another_vector_changes_plots_and_contexts(visit):
    page = visit(explorer().to_html())
    options = page.locator(".polca-bar option").all_inner_texts()
    assert options[1] == "Vector 2 · 2 clusters: PUNCT after PROPN, subword inside a name"
    assert options[2] == "Vector 3 · no clusters"
    before = lines_of(page), lines_of(page, 1)
    page.locator("select").select_option(index=1)
    after = lines_of(page), lines_of(page, 1)
    assert [len(lines) for lines in before + after] == [3, 3, 2, 2]
    assert state(page) == ("2", "1")
    assert {found[:2] for found in shown(page)} == {("2", "1")}
    births = page.evaluate("document.querySelector('.polca-plot').layout.shapes.map(shape => shape.x0)")
    assert births == [300, 200]
    page.get_by_role("button", name="next vector").click()
    assert state(page) == ("3", "")
    assert page.get_by_text("No clusters along this vector.").is_visible()
    assert not page.locator(".polca-plots").is_visible()
    assert page.get_by_role("button", name="next vector").is_disabled()
    page.get_by_role("button", name="previous vector").click()
    assert page.locator(".polca-plots").is_visible()


def test_vector_0_is_the_exact_loss(visit):
    page = visit(explorer({0: [50, 40]}).to_html())
    assert page.locator(".polca-bar option").first.inner_text().startswith("Exact loss, no vector · 2 clusters")
    assert page.locator(".polca-panel .polca-name").first.inner_text().startswith("Exact loss")


def test_more_than_eight_clusters_stay_apart_and_one_may_have_no_contexts(visit):
    summary, clusters, contexts = tables({1: [40] * 10})
    page = visit(Explorer(summary, clusters, contexts[contexts["cluster"] != 9], title="t").to_html())
    looks = page.evaluate(
        "document.querySelectorAll('.polca-plot')[1].data.map(t => [t.line.color, t.line.dash].join())"
    )
    assert len(set(looks)) == 10
    page.locator(".polca-chip").nth(8).click()
    assert page.locator(".polca-contexts").inner_text() == "No contexts are kept."


def test_a_run_without_clusters_says_so(visit):
    page = visit(explorer({1: [], 2: []}).to_html(), plots=False)
    assert page.get_by_text("No clusters along this vector.").is_visible()


def test_hostile_text_is_shown_literally(visit):
    summary, clusters, contexts = tables()
    clusters["label"] = clusters["mirrors"] = HOSTILE
    contexts[["before", "target", "after", "title", "attribution"]] = HOSTILE
    contexts["url"] = "javascript:window.hacked=1"
    page = visit(Explorer(summary, clusters, contexts, title=HOSTILE, note=HOSTILE).to_html())
    read = page.locator(".polca-text").first.text_content()
    assert read == 3 * HOSTILE
    assert page.locator(".polca-text mark").first.text_content() == HOSTILE
    for where in (".polca-title", ".polca-label", ".polca-source bdi"):
        assert page.locator(where).first.text_content() == HOSTILE
    page.mouse.move(*point(page, 2))
    page.locator(".polca-chip").nth(1).click()
    assert page.locator(".polca-explorer a, .polca-explorer img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_leading_spaces_and_links_stay(visit):
    page = visit(explorer().to_html())
    mark = page.locator(".polca-text mark").first
    assert mark.text_content() == " harbour"
    assert mark.evaluate("one => getComputedStyle(one).whiteSpace") in ("pre-wrap", "break-spaces")
    link = page.locator(".polca-source a").first
    assert link.get_attribute("href") == "https://example.org/wiki/Lake?a=1&b=2"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert page.locator(".polca-source").first.inner_text() == "Lake Constance · Wikipedia, CC BY-SA 4.0"


def ink(page):
    return page.evaluate("document.querySelector('.polca-plot').layout.font.color")


def test_the_theme_of_the_page_sets_the_colours_of_the_plots(visit):
    page = visit(explorer().to_html())
    light = ink(page), lines_of(page)[0][1]
    assert light[1] == "#0072B2"
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_selector(".polca-explorer[data-scheme='dark']")
    dark = ink(page), lines_of(page)[0][1]
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    page.wait_for_selector(".polca-explorer[data-scheme='light']")
    assert (ink(page), lines_of(page)[0][1]) == light


def test_where_the_page_has_no_theme_the_system_sets_it(visit):
    page = visit(explorer().to_html(), color_scheme="dark")
    assert page.locator(".polca-explorer").get_attribute("data-scheme") == "dark"
    page.emulate_media(color_scheme="light")
    page.wait_for_selector(".polca-explorer[data-scheme='light']")


def test_on_a_phone_plots_are_stacked_and_nothing_overflows(visit):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    summary, clusters, contexts = tables()
    clusters["label"] = "a very long label of a cluster, " * 4
    contexts.loc[0, "after"] = "x" * 300
    page = visit(Explorer(summary, clusters, contexts, title="Clusters", note="n" * 90).to_html(), **phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (page.locator(".polca-plot").nth(side).bounding_box() for side in (0, 1))
    assert second["y"] >= first["y"] + first["height"]
    assert first["width"] > 300
    page.touchscreen.tap(*point(page, 3))
    page.wait_for_selector(".polca-explorer[data-cluster='3']")
    assert {found[:2] for found in shown(page)} == {("1", "3")}
    page.locator(".polca-chip").nth(1).tap()
    assert state(page) == ("1", "2")


def test_on_a_wide_page_plots_are_side_by_side(visit):
    page = visit(explorer().to_html())
    first, second = (page.locator(".polca-plot").nth(side).bounding_box() for side in (0, 1))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]


def test_keys_choose_vectors_and_clusters(visit):
    page = visit(explorer().to_html())
    page.locator(".polca-chip").first.focus()
    page.keyboard.press("ArrowRight")
    assert state(page) == ("1", "2")
    assert page.evaluate("document.activeElement.dataset.cluster") == "2"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert state(page) == ("1", "3")
    page.locator(".polca-plots").focus()
    page.keyboard.press("ArrowRight")
    assert state(page) == ("2", "1")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert state(page) == ("1", "1")
    page.get_by_role("button", name="next vector").focus()
    page.keyboard.press("Enter")
    assert state(page) == ("2", "1")
    page.locator("select").focus()
    page.keyboard.press("ArrowUp")
    assert state(page) == ("1", "1")


def sphinx_page(folder, *fragments, plotly=True):
    """A page as Sphinx lays it out: content root two folders up, and plotly.js in ``_static``."""
    (folder / "_static").mkdir()
    if plotly:
        (folder / "_static" / PLOTLY_FILE).write_text(get_plotlyjs(), encoding="utf-8")
    path = folder / "notebooks" / "deep" / "page.html"
    path.parent.mkdir(parents=True)
    root = '<html data-content_root="../../" data-theme="light">'
    path.write_text(html_page(*fragments, root=root), encoding="utf-8")
    return path


def test_two_explorers_on_a_page_of_the_book_are_independent(visit, tmp_path):
    page = visit(sphinx_page(tmp_path, explorer()._repr_html_(), explorer({4: [90, 80]})._repr_html_()))
    assert page.locator(".polca-explorer").count() == 2
    assert page.locator(f"head script[src$='{PLOTLY_FILE}']").count() == 1
    page.locator(".polca-explorer").nth(1).locator(".polca-chip").nth(1).click()
    assert (state(page), state(page, 1)) == (("1", "1"), ("4", "2"))
    page.locator("select").first.select_option(index=1)
    page.locator(".polca-chip").nth(1).click()
    assert (state(page), state(page, 1)) == (("2", "2"), ("4", "2"))
    identifiers = page.evaluate("[...document.querySelectorAll('.polca-explorer [id]')].map(one => one.id)")
    assert len(identifiers) == len(set(identifiers))


def test_require_js_on_the_page_does_not_swallow_plotly(visit, tmp_path):
    amd = "<script>window.calls = 0; window.define = () => { window.calls += 1; }; window.define.amd = {};</script>"
    path = sphinx_page(tmp_path, amd, explorer()._repr_html_(), plotly=False)
    register = "if (typeof define === 'function' && define.amd) define([], () => 0); else {"
    (tmp_path / "_static" / PLOTLY_FILE).write_text(f"{register}{get_plotlyjs()}}}", encoding="utf-8")
    page = visit(path)
    assert page.evaluate("[window.calls, Boolean(window.define.amd)]") == [0, True]


def test_without_plotly_the_contexts_can_be_read(visit, tmp_path):
    page = visit(sphinx_page(tmp_path, explorer()._repr_html_(), plotly=False), plots=False)
    message = page.locator(".polca-message")
    message.wait_for()
    assert f"_static/{PLOTLY_FILE}" in message.inner_text()
    page.locator(".polca-chip").nth(1).click()
    assert {found[:2] for found in shown(page)} == {("1", "2")}
    assert all("ERR_FILE_NOT_FOUND" in problem for problem in visit.problems)
    visit.problems.clear()


def test_outside_the_book_the_fragment_asks_plotlys_cdn_for_the_shipped_version_and_nobody_else(visit):
    page = visit(html_page(explorer()._repr_html_()), allow="https://cdn.plot.ly/plotly-", plots=False)
    page.locator(".polca-message").wait_for()
    assert page.locator(".polca-message").inner_text().count("https://cdn.plot.ly/plotly-") == 1
    assert len(shown(page)) == 6
    assert all("ERR_FAILED" in problem for problem in visit.problems)
    visit.problems.clear()


def test_the_shipped_plotly_is_what_the_cdn_copy_must_hash_to(browser, tmp_path):
    fragment = explorer()._repr_html_()
    url = json.loads(data_of(fragment))["plotly"]["url"]
    with browser.new_context() as context:
        page = context.new_page()
        body, headers = get_plotlyjs(), {"Access-Control-Allow-Origin": "*"}
        page.route(url, lambda route: route.fulfill(body=body, content_type="text/javascript", headers=headers))
        path = tmp_path / "lab.html"
        path.write_text(html_page(fragment), encoding="utf-8")
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        assert not page.locator(".polca-message").is_visible()


def test_an_output_that_reaches_the_page_after_its_script_wakes_up(visit):
    fragment = explorer()._repr_html_()
    script = fragment[fragment.rindex("<script>") :]
    late = "<script>setTimeout(() => document.body.append(document.querySelector('template').content), 200)</script>"
    plotly = f"<script>{get_plotlyjs()}</script>"
    page = visit(html_page(plotly, f"<template>{fragment.removesuffix(script)}</template>", late, script), plots=False)
    page.locator(".polca-chip").first.wait_for()
    assert state(page) == ("1", "1")


def test_it_opens_on_the_vector_with_most_labels_that_tell_something(visit):
    summary, clusters, contexts = tables({1: [9] * 3, 2: [9] * 2, 3: [9] * 2, 4: []})
    clusters["simple"] = clusters["vector"] == 2
    page = visit(Explorer(summary, clusters, contexts, title="t").to_html())
    assert state(page) == ("2", "1")
    assert page.locator("select").input_value() == "1"
    # Labels of another kind count alike; of equal ones the first vector is shown.
    clusters["simple"] = None
    assert Explorer(summary, clusters, contexts, title="t")._data["start"] == 0
    assert Explorer(*tables({1: [], 2: []}), title="t")._data["start"] == 0


def test_clusters_of_pad_are_shown_on_request_alone(visit):
    summary, clusters, contexts = tables()
    clusters["padding"] = clusters["cluster"] == 1
    page = visit(Explorer(summary, clusters, contexts, title="t").to_html())
    assert state(page) == ("1", "2")
    assert page.locator(".polca-chip").count() == 2
    assert [number for number, *_ in lines_of(page)] == [2, 3]
    assert page.locator("option").nth(1).inner_text().startswith("Vector 2 · 1 cluster: ")
    page.get_by_label("clusters of PAD").check()
    assert page.locator(".polca-chip").count() == 3
    assert page.locator("option").nth(1).inner_text().startswith("Vector 2 · 2 clusters: ")
    page.get_by_label("clusters of PAD").uncheck()
    assert page.locator(".polca-chip").count() == 2
    assert not visit(explorer().to_html()).get_by_label("clusters of PAD").is_visible()


def test_a_search_finds_tokens_first_then_what_is_said_and_leads_there(visit):
    summary, clusters, contexts = tables()
    clusters["about"] = np.where(clusters["tokens"] == 410, "tags: Harbour; ADP", "")
    page = visit(Explorer(summary, clusters, contexts, title="t").to_html())
    field, hits = page.get_by_role("searchbox"), page.locator(".polca-results button")
    assert not page.locator(".polca-results").is_visible()
    field.fill("harbour")
    assert hits.all_inner_texts() == ["vector 1, 1: PUNCT after PROPN", "vector 2, 1: PUNCT after PROPN"]
    field.fill("adp")  # in what is said about one, and in the label of another
    assert hits.all_inner_texts() == ["vector 1, 3: DET after ADP", "vector 2, 1: PUNCT after PROPN"]
    hits.nth(1).click()
    assert state(page) == ("2", "1")
    assert page.locator(".polca-about").inner_text() == "tags: Harbour; ADP"
    field.press("ArrowRight")  # moves the caret, and changes no vector
    assert state(page) == ("2", "1")
    field.fill(HOSTILE)
    assert page.locator(".polca-results").inner_text() == "no clusters"


def test_the_composition_of_a_cluster_is_shown_with_its_largest_kinds(visit):
    summary, clusters, contexts = tables()
    kinds = ["<b>10s</b>", "1s", "1000s"]
    counts = np.zeros((3, 3, 3), int)
    counts[0, 0] = [60, 180, 0]
    summary = summary.assign(tokens=(("vector", "cluster", "skill"), counts)).assign_coords(skill=kinds)
    page = visit(Explorer(summary, clusters, contexts, title="t").to_html())
    rows = page.locator(".polca-composition > div").all_inner_texts()
    assert [row.split("\n") for row in rows] == [["1s", "180 · 75%"], ["<b>10s</b>", "60 · 25%"]]
    widths = page.eval_on_selector_all(".polca-share", "all => all.map(one => one.style.getPropertyValue('--share'))")
    assert widths == ["75%", "25%"]
    page.locator(".polca-chip").nth(1).click()
    assert page.locator(".polca-composition > div").count() == 0


def test_long_labels_are_shown_whole_on_chips_and_short_in_the_list_of_vectors(visit):
    summary, clusters, contexts = tables({1: [90]})
    clusters["label"] = "“,” after “)”, 78% of the cluster, 9 times as often as outside"
    page = visit(Explorer(summary, clusters, contexts, title="t").to_html())
    assert page.locator("option").first.inner_text() == "Vector 1 · 1 cluster: “,” after “)”"
    assert "9 times as often as outside" in page.locator(".polca-chip").inner_text()
