"""The two tasks of text: windows, batches, losses, and a whole run and study of each in miniature."""

import json

import numpy as np
import pandas as pd
import pytest
import spacy
import torch
from cases import TINY_RUN, token_gradients
from polca_paper import english
from polca_paper.english import SHOWN, TABLES, LanguageStudy, explorer_of
from polca_paper.saved_study import SavedStudy
from polca_paper.studies import complete
from polca_paper.verdicts import PAPER_ENGLISH, english_counts, judge_english
from spacy.language import Language as Pipeline

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.vectors import read_vectors
from polca_lib.tasks import grammar
from polca_lib.tasks.corpus import Article, is_validation
from polca_lib.tasks.language import CONTEXT, Grammar, Wikipedia, next_token_loss
from polca_lib.tasks.models import ENGLISH, build_model
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings

pytestmark = pytest.mark.slow

TINY = {
    **{name: value for name, value in TINY_RUN.items() if not name.startswith("clustering")},
    "basis.n_vectors": 2,
    "projection.curvature_examples": 2,
    "clustering.min_cluster_size": 8,
    "clustering.breakthrough_window": 10,
}
WORDS = {"the": "DET", "The": "DET", "of": "ADP", "from": "ADP", "to": "ADP", ",": "PUNCT", ".": "PUNCT", "is": "AUX"}


@Pipeline.component("tag_by_word_list")
def tag_by_word_list(doc):
    for token in doc:
        token.pos_ = WORDS.get(token.text, "NOUN")
    return doc


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A spaCy pipeline on disk that tags by a list of words."""
    path = tmp_path_factory.mktemp("spacy") / "words"
    nlp = spacy.blank("en")
    nlp.add_pipe("tag_by_word_list")
    nlp.to_disk(path)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A corpus of eighty articles on disk, some of them for validation."""
    path, rng = tmp_path_factory.mktemp("wikipedia") / "articles.jsonl", np.random.default_rng(0)
    articles = []
    titles = [f"Article {i}" for i in range(1000)]
    kept = [title for title in titles if is_validation(Article(title, "", ""))][:6]
    for title in [*kept, *(title for title in titles[:74] if title not in kept)]:
        text = "".join(grammar.VOCABULARY[j] for j in grammar.document(rng).ids)
        articles.append({"title": title, "text": text, "url": f"https://example.org/{title[8:]}"})
    path.write_text("".join(json.dumps(article) + "\n" for article in articles))
    return path


@pytest.fixture
def wikipedia(source, monkeypatch):
    """A run of task wikipedia in miniature, its corpus named by the environment."""
    monkeypatch.setenv("POLCA_WIKIPEDIA", str(source))
    return Run.from_preset("smoke", task="wikipedia", **TINY)


def grammar_run(**overrides):
    return Run.from_preset("smoke", task="grammar", **{**TINY, **overrides})


def test_english_model_has_the_paper_s_number_of_parameters_and_the_preset_its_targets():
    config = RunSettings.from_preset("paper", task="wikipedia")
    assert config.model == ENGLISH
    assert sum(p.numel() for p in build_model(config.model, 0).parameters()) == 40_274_737
    assert config.data.validation_examples * config.targets_per_example == 12_600
    assert config.n_vectors == 30
    assert config.training.steps * config.training.batch_size * config.model.n_ctx == 114_688_000


def test_loss_is_that_of_each_token_but_the_first_two_given_those_before():
    run = grammar_run()
    model, windows = build_model(run.settings.model, 0), run.task.validation[:3]
    found = next_token_loss(model, windows).view(3, -1)
    for row, window in zip(found, windows, strict=True):
        for column, loss in enumerate(row):
            position = column + CONTEXT
            expected = -model(window[None, :position])[0, -1].log_softmax(-1)[window[position]]
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["grammar", "wikipedia"])
def test_without_pad_neither_pad_nor_what_is_predicted_from_it_is_a_token(task, source, monkeypatch):
    monkeypatch.setenv("POLCA_WIKIPEDIA", str(source))
    many = {**TINY, "data.validation_examples": 60}  # so that some windows end in PAD
    runs = {pad: Run.from_preset("smoke", task=task, **many, **{"language.predict_pad": pad}) for pad in (True, False)}
    windows, tables = runs[True].task.validation, {pad: run.task.tokens for pad, run in runs.items()}
    pad = runs[True].settings.model.d_vocab - 1
    words = tables[True][(tables[True]["text"] != grammar.PAD).to_numpy()].reset_index(drop=True)
    assert 0 < len(words) < len(tables[True]) == windows.shape[0] * (windows.shape[1] - CONTEXT)
    pd.testing.assert_frame_equal(tables[False], words)
    model = build_model(runs[True].settings.model, 0)
    every, counted = (runs[pad].task.loss(model, windows) for pad in (True, False))
    torch.testing.assert_close(counted, every[torch.tensor(tables[True]["id"] != pad)])
    # A word after PAD, which no corpus has, is predicted from PAD and carries no loss.
    row = torch.tensor([[0, 1, pad, 2, 3, pad]])
    assert len(runs[False].task.loss(model, row)) == 1


def test_pad_that_is_predicted_leaves_keys_as_they_were_and_left_out_it_makes_another_run():
    on, off = (grammar_run(**{"language.predict_pad": pad}) for pad in (True, False))
    assert "language" not in on._training.config
    assert off._training.config["language"] == {"predict_pad": False}
    assert all(on.keys[stage] != off.keys[stage] for stage in on.keys)


def test_setting_of_text_is_refused_for_sums():
    with pytest.raises(ValueError, match=r"language\.predict_pad = False is for text"):
        RunSettings.from_preset("smoke", **{"language.predict_pad": False})


def test_windows_without_any_word_to_predict_are_analysed_with_the_others(tmp_path):
    run = Run(grammar_run(**{"language.predict_pad": False}).settings, tmp_path)
    run.task._validation[0][1, 1:] = run.settings.model.d_vocab - 1
    assert 1 not in run.tokens["example"].to_numpy()
    projections = run.projections
    assert projections["example"].values.tolist() == run.tokens["example"].tolist()
    for step in (0, 40):
        expected = run.checkpoints.token_loss(run.checkpoints.theta(step), run.task.validation)
        np.testing.assert_allclose(projections["loss"].sel(step=step), expected.detach(), rtol=1e-5)


def test_each_epoch_takes_every_window_once_and_a_batch_depends_on_its_step_alone():
    config = RunSettings.from_preset("smoke", task="grammar", **{"training.batch_size": 4})
    task = Grammar(config)
    task.train = np.arange(10)[:, None] + np.zeros((1, 3), int)
    drawn = torch.cat([task.batch(step)[:, 0] for step in range(5)]).tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    other = Grammar(config)
    other.train = task.train
    torch.testing.assert_close(other.batch(2), torch.tensor(drawn[8:12])[:, None].expand(4, 3))


def test_grammar_samples_are_of_different_documents_and_every_token_is_what_the_table_says():
    task = grammar_run(**{"language.predict_pad": True}).task
    windows = task.validation
    assert len({task.validation.numpy().tobytes(), task.hessian.numpy().tobytes(), task.train.tobytes()}) == 3
    assert len(task.train) == TINY["training.steps"] * TINY["training.batch_size"]
    table = task.tokens
    assert len(table) == windows.shape[0] * (windows.shape[1] - CONTEXT)
    for row in table.sample(50, random_state=0).itertuples():
        assert windows[row.example, row.position] == row.id
        assert grammar.VOCABULARY[row.id] == row.text
        assert task.tags[row.example, row.position] == row.tag
    assert set(table["construction"]) <= set(grammar.CONSTRUCTIONS)


def test_a_grammar_that_generates_otherwise_is_another_run(monkeypatch):
    before = grammar_run().keys
    monkeypatch.setattr(grammar, "document", lambda rng: grammar.Document(*3 * [np.zeros(5, np.int64)]))
    assert grammar_run().keys != before


def test_a_model_that_does_not_fit_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=rf"model.d_vocab = 5 .* allowed: {len(grammar.VOCABULARY)}"):
        _ = grammar_run(**{"model.d_vocab": 5}).task


def test_wikipedia_decomposes_windows_of_articles_that_are_never_trained_on(wikipedia):
    task = wikipedia.task
    assert isinstance(task, Wikipedia)
    assert len(task.sources) == len(task.validation)
    assert all(is_validation(article) for article in task.corpus.articles)
    for window, title in zip(task.texts, task.sources["title"], strict=True):
        text = next(article.text for article in task.corpus.articles if article.title == title)
        assert "".join(window).replace(grammar.PAD, "") in text
    trained = {row.tobytes() for row in np.asarray(task.train)}
    assert not trained & {row.astype(task.train.dtype).tobytes() for row in task.validation.numpy()}
    with pytest.raises(ValueError, match=r"data.validation_examples = 100000 is more than the \d+ windows"):
        _ = Run.from_preset("smoke", task="wikipedia", **{**TINY, "data.validation_examples": 100_000}).task.validation


def test_the_corpus_is_part_of_what_a_run_is_and_its_path_is_not(wikipedia, source, tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(source.read_bytes())
    keys = wikipedia.keys
    monkeypatch.setenv("POLCA_WIKIPEDIA", str(copy))
    assert Run.from_preset("smoke", task="wikipedia", **TINY).keys == keys
    copy.write_text(source.read_text().replace(" was ", " had "))
    monkeypatch.setenv("POLCA_WIKIPEDIA", str(copy.rename(tmp_path / "changed.jsonl")))
    assert Run.from_preset("smoke", task="wikipedia", **TINY).keys != keys


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("task", ["grammar", "wikipedia"])
def test_projections_of_text_are_the_gradients_of_its_tokens(task, pad, source, monkeypatch):
    monkeypatch.setenv("POLCA_WIKIPEDIA", str(source))
    run = Run.from_preset("smoke", task=task, **TINY, **{"language.predict_pad": pad})
    token_loss, theta = run.checkpoints.token_loss, run.checkpoints.theta(20)
    assert isinstance(token_loss, TokenLoss)
    at = run.projections.sel(step=20)
    some = (run.tokens["example"] < 2).to_numpy()
    gradients = token_gradients(token_loss, theta, run.task.validation[:2]) @ read_vectors(run.basis).T
    np.testing.assert_allclose(at["gradient"][some], gradients, atol=1e-4)
    assert at["text"].values.tolist() == run.tokens["text"].tolist()


@pytest.fixture(params=["grammar", "wikipedia"])
def study(request, source, pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("POLCA_WIKIPEDIA", str(source))
    monkeypatch.setenv("POLCA_STUDIES", str(tmp_path))
    run = Run.from_preset("smoke", task=request.param, **TINY)
    return LanguageStudy(run, ablation_curvature=2, pipeline=pipeline)


def test_study_of_text_is_kept_with_every_table_and_no_path(study, tmp_path):
    complete(study, "tiny")
    kept = SavedStudy("tiny", setting="english")
    assert {path.stem for path in kept.path.glob("*.csv")} == set(TABLES)
    record = (kept.path / "provenance.json").read_text()
    assert str(tmp_path.parent) not in record
    assert kept.provenance["stages"]["corpus"] == study.run.task.description
    counts = kept.table("counts").set_index("kind")
    labels = kept.table("labels")
    for kind, row in counts.iterrows():
        own = labels[labels["kind"] == kind]
        assert row["clusters"] == len(own)
        assert row["simple_label"] == own.loc[own["simple"], "vector"].nunique() <= row["clustered"] <= row["kept"]
        assert row["tokens"] == len(study.run.tokens)
    assert set(kept.clusters["kind"].values) == set(SHOWN)
    contexts = kept.table("contexts")
    assert (contexts.groupby(["kind", "vector", "cluster"])["rank"].max() <= 10).all()
    assert ("title" in contexts) == (study.run.settings.task == "wikipedia")


def kept_study(study):
    complete(study, "tiny")
    return SavedStudy("tiny", setting="english")


def test_counts_and_verdicts_on_english_follow_from_the_tables(wikipedia, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("POLCA_STUDIES", str(tmp_path))
    kept = kept_study(LanguageStudy(wikipedia, pipeline=pipeline))
    kind = "POLCA first, unit"
    counts, row = english_counts(kept, kind), kept.table("counts").set_index("kind").loc[kind]
    assert {name: counts[name] for name in PAPER_ENGLISH} == row[list(PAPER_ENGLISH)].to_dict()
    assert counts["corpus"] == wikipedia.task.description
    assert "task = " not in counts["preset"]
    verdicts = judge_english(kept, kind).set_index("claim")
    falling = verdicts.loc["directions whose mean falls, share"]
    assert falling["ours"] == row["kept"] / row["vectors"]
    assert (falling["verdict"] == "reproduced") == (abs(falling["ours"] - 26 / 30) <= 0.05)
    mirrored = verdicts.loc["there are clusters that mirror each other"]
    pairs = kept.table("mirrored")
    assert (mirrored["verdict"] == "reproduced") == (pairs["kind"] == kind).any()


def test_explorer_shows_what_a_study_keeps(study, tmp_path):
    kept = kept_study(study)
    tables = {name: kept.table(name) for name in ("labels", "contexts", "mirrored")}
    for kind in SHOWN:
        own = tables["labels"][tables["labels"]["kind"] == kind]
        shown = explorer_of(kept.clusters, *tables.values(), kind, title="tiny")
        assert len(shown._data["vectors"]) == own["vector"].nunique()
    with pytest.raises(ValueError, match="kind = 'LCA' has no curves kept; allowed: POLCA second, raw"):
        explorer_of(kept.clusters, *tables.values(), "LCA", title="tiny")


def test_tags_of_wikipedia_are_those_of_the_words_in_the_whole_article(wikipedia, pipeline):
    tags = LanguageStudy(wikipedia, pipeline=pipeline).tags
    tokens = wikipedia.tokens
    assert len(tags) == len(tokens)
    whole = tokens["text"].str.strip().isin(WORDS) & tokens["text"].str.startswith(" ")
    assert whole.sum() > 10
    assert (tags["tag"][whole] == tokens["text"][whole].str.strip().map(WORDS)).mean() > 0.95
    newline = tokens["text"].str.strip() == ""
    assert (tags["tag"][newline] == "SPACE").all()
    shifted = tags["tag_1"].to_numpy()[1:][np.diff(tokens["example"]) == 0]
    assert (shifted == tags["tag"].to_numpy()[:-1][np.diff(tokens["example"]) == 0]).all()


def test_labels_come_from_known_constructions_in_the_grammar():
    study = LanguageStudy(grammar_run())
    assert study.tags["tag"].tolist() == study.run.tokens["tag"].tolist()
    assert set(english.constructions(study)["construction"]) <= set(grammar.CONSTRUCTIONS)
    assert study.by == "construction"
    assert "pipeline" not in vars(study)  # no tagger was asked


def test_settings_of_a_study_name_the_corpus_and_not_where_it_lies(source, pipeline):
    run = Run.from_preset("smoke", task="wikipedia", **{**TINY, "corpus.source": str(source)})
    assert LanguageStudy(run, pipeline=pipeline).settings["run"]["corpus"]["source"] == "articles.jsonl"


@pytest.mark.parametrize("setting", [{"basis.kind": "random"}, {"projection.curvature": False}])
def test_study_of_text_refuses_a_run_whose_tables_it_could_not_make(setting):
    with pytest.raises(ValueError, match=r"allowed for the run of a study of text: 'hessian' and True"):
        LanguageStudy(grammar_run(**setting))
