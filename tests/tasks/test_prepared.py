import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import fail_at, flip_bit, folder_bytes

from polca_lib.storage.artefacts import ArtefactMismatch, DamagedFile
from polca_lib.tasks import prepared
from polca_lib.tasks.corpus import Article, DamagedCorpus, is_validation, read_articles
from polca_lib.tasks.prepared import FILES, prepare_corpus
from polca_lib.tasks.tokenization import encode

WIDTH, VOCABULARY, N_ARTICLES = 16, 300, 170
SETTINGS = {"vocabulary": VOCABULARY, "width": WIDTH, "articles": N_ARTICLES, "tokenizer_articles": 50}
WORDS = ["the", "of", "theory", "café", "Œuvre", "日本", "👩\u200d👧", "in", "thieves", "1984", "naïve", "on", "then\n"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """200 articles of random words."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("source") / "wiki.jsonl"
    articles = [
        Article(f"Title {i}", " ".join(draw.choices(WORDS, k=draw.randint(0, 60))), f"https://example.org/{i}")
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(article._asdict()) + "\n" for article in articles))
    return path


@pytest.fixture(scope="module")
def corpus(source, tmp_path_factory):
    return prepare_corpus(tmp_path_factory.mktemp("prepared") / "corpus", source, **SETTINGS)


@pytest.fixture
def copy(source, tmp_path):
    """A corpus that may be damaged."""
    return prepare_corpus(tmp_path / "corpus", source, **SETTINGS)


@pytest.fixture
def taken(source):
    """The articles that the corpus should be made of: up to the last one of training."""
    articles, n = [], 0
    for article in read_articles(source):
        articles.append(article)
        n += not is_validation(article)
        if n == N_ARTICLES:
            break
    return articles


def texts(corpus, windows):
    return [corpus.tokenizer.decode(window[window != corpus.pad]) for window in windows]


def test_training_windows_are_the_training_articles(corpus, taken):
    wanted = [article.text for article in taken if not is_validation(article)]
    tokens = np.concatenate([encode(corpus.tokenizer, text).ids for text in wanted])
    assert corpus.train[corpus.train != corpus.pad].tolist() == tokens.tolist()
    assert corpus.counts.articles == len(wanted) == N_ARTICLES
    assert corpus.counts.tokens == len(tokens)
    assert corpus.train.shape[1] == WIDTH
    assert corpus.train.dtype == np.uint16
    assert isinstance(corpus.train, np.memmap)


def test_validation_articles_are_those_met_on_the_way_and_none_is_in_training(corpus, taken):
    assert corpus.articles == [article for article in taken if is_validation(article)]
    assert len(corpus.articles) == corpus.counts.validation_articles == 5
    assert corpus.counts.validation_tokens == (corpus.validation != corpus.pad).sum()
    joined = "".join(texts(corpus, corpus.train))
    assert all(article.text for article in corpus.articles)
    assert not any(article.text in joined for article in corpus.articles)


def test_each_validation_token_is_found_in_its_article(corpus):
    assert len(corpus.validation) == len(corpus.article) == len(corpus.starts) == len(corpus.ends)
    for number, article in enumerate(corpus.articles):
        rows = corpus.article == number
        windows, starts, ends = corpus.validation[rows], corpus.starts[rows], corpus.ends[rows]
        real, encoded = windows != corpus.pad, encode(corpus.tokenizer, article.text)
        assert windows[real].tolist() == encoded.ids.tolist()
        assert starts[real].tolist() == encoded.starts.tolist()
        assert ends[real].tolist() == encoded.ends.tolist()
        assert (starts[~real] == len(article.text)).all()
        assert (ends[~real] == len(article.text)).all()


def test_pad_is_the_last_id(corpus):
    assert corpus.pad == VOCABULARY
    assert corpus.tokenizer.id_to_token(corpus.pad) == "<PAD>"


def test_the_tokenizer_knows_only_the_first_training_articles(corpus, taken):
    first = [article for article in taken if not is_validation(article)][:50]
    expected = prepared.train_tokenizer((article.text for article in first), VOCABULARY)
    assert corpus.tokenizer.to_str() == expected.to_str()


def test_small_batches_give_the_same_corpus(corpus, source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "BATCH_CHARACTERS", 300)
    other = prepare_corpus(tmp_path / "other", source, **SETTINGS)
    assert other.checksum == corpus.checksum


def test_another_width_gives_another_checksum(corpus, source, tmp_path):
    other = prepare_corpus(tmp_path / "other", source, **{**SETTINGS, "width": 8})
    assert other.checksum != corpus.checksum
    assert other.counts == corpus.counts


def test_without_a_limit_all_articles_are_taken(source, tmp_path):
    corpus = prepare_corpus(tmp_path / "all", source, **{**SETTINGS, "articles": None})
    assert (corpus.counts.articles, corpus.counts.validation_articles) == (194, 6)


def test_a_second_call_loads_without_the_source(corpus, source, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the source was read")

    before = folder_bytes(corpus.folder)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_take", never)
        again = prepare_corpus(corpus.folder, source, **SETTINGS)
    assert folder_bytes(corpus.folder) == before
    assert (again.checksum, again.counts, again.source) == (corpus.checksum, corpus.counts, "wiki.jsonl")
    assert again.tokenizer.to_str() == corpus.tokenizer.to_str()
    assert (again.train == corpus.train).all()
    assert again.articles == corpus.articles


@pytest.mark.parametrize(
    ("name", "value"), [("vocabulary", 301), ("width", 8), ("articles", None), ("skip_damaged", True)]
)
def test_other_settings_are_refused_by_name(corpus, source, name, value):
    with pytest.raises(ArtefactMismatch, match=rf"config\.{name} = .*, but config\.{name} = {value}"):
        prepare_corpus(corpus.folder, source, **{**SETTINGS, name: value})


def test_another_source_is_refused(corpus):
    with pytest.raises(
        ArtefactMismatch, match=r"config\.source = '.*wiki\.jsonl', but config\.source = 'hub:20220301\.en'"
    ):
        prepare_corpus(corpus.folder, "hub", **SETTINGS)


@pytest.mark.parametrize("name", [*FILES, "contents.json"])
def test_a_flipped_bit_is_found_and_its_file_named(copy, source, name):
    path = copy.folder / name
    for position in (0, path.stat().st_size // 2, path.stat().st_size - 1):
        flip_bit(path, position)
        with pytest.raises(DamagedFile, match=rf"{name} is damaged.*delete .*corpus to prepare"):
            prepare_corpus(copy.folder, source, **SETTINGS)
        flip_bit(path, position)
    prepare_corpus(copy.folder, source, **SETTINGS)


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_is_named(copy, source, name):
    (copy.folder / name).unlink()
    with pytest.raises(DamagedFile, match=f"{name} is missing"):
        prepare_corpus(copy.folder, source, **SETTINGS)


def test_a_folder_of_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DamagedFile, match="is no prepared corpus"):
        prepare_corpus(tmp_path, source, **SETTINGS)
    assert folder_bytes(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("function", ["train_tokenizer", "encode_many", "pack", "write_atomically"])
def test_an_interrupted_preparation_leaves_nothing_and_starts_anew(corpus, source, tmp_path, monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(prepared, function, fail_at(getattr(prepared, function), 1))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(tmp_path / "corpus", source, **SETTINGS)
    assert folder_bytes(tmp_path) == {}
    assert prepare_corpus(tmp_path / "corpus", source, **SETTINGS).checksum == corpus.checksum


def test_a_killed_preparation_is_not_taken_for_a_corpus(corpus, source, tmp_path):
    script = f"""
        import os, pathlib, signal
        from polca_lib.tasks import prepared
        prepared.write_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        prepared.prepare_corpus(pathlib.Path({str(tmp_path)!r}) / "corpus", {str(source)!r}, **{SETTINGS})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".corpus.partial"]  # what it had when it was killed
    assert prepare_corpus(tmp_path / "corpus", source, **SETTINGS).checksum == corpus.checksum
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_of_two_at_once_one_prepares_and_the_other_waits(source, tmp_path, monkeypatch):
    calls, fill = [], prepared._fill

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.2)
        fill(*arguments)

    monkeypatch.setattr(prepared, "_fill", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare_corpus(tmp_path / "corpus", source, **SETTINGS), range(2))
    assert first.checksum == second.checksum
    assert len(calls) == 1


def test_damage_stops_the_preparation_or_is_counted(corpus, source, tmp_path):
    broken = tmp_path / "broken.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join([*lines[:3], b"no JSON\n", *lines[3:]]))
    with pytest.raises(DamagedCorpus, match=r"broken\.jsonl, line 4"):
        prepare_corpus(tmp_path / "corpus", broken, **SETTINGS)
    with pytest.warns(UserWarning, match="line 4"):
        other = prepare_corpus(tmp_path / "corpus", broken, **SETTINGS, skip_damaged=True)
    assert other.counts == corpus.counts._replace(damaged=1)
    assert (other.train == corpus.train).all()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("validation", [False, True])
def test_corpus_of_one_article_is_refused(source, tmp_path, n, validation):
    lines = source.read_text().splitlines(keepends=True)
    kept = [line for line in lines if is_validation(Article(json.loads(line)["title"], "", "")) == validation]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(kept[:n]))
    with pytest.raises(ValueError, match=rf"source = '.*few\.jsonl' has {n} articles; allowed: 2 or more"):
        prepare_corpus(tmp_path / "corpus", few, **SETTINGS)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"articles": 195}, r"articles = 195 is more than source = '.*wiki\.jsonl' gives: 194"),
        ({"articles": 50}, "none of the 50 articles .* for validation"),
        ({"articles": 0}, "articles = 0; allowed: at least 1"),
        ({"width": 0}, "width = 0; allowed: at least 1"),
        ({"tokenizer_articles": 0}, "tokenizer_articles = 0; allowed: at least 1"),
        ({"vocabulary": 30_000}, "vocabulary = 30000 is more than the text"),
    ],
)
def test_settings_that_the_source_can_not_meet_are_refused_and_nothing_is_left(source, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_corpus(tmp_path / "corpus", source, **{**SETTINGS, **changes})
    assert folder_bytes(tmp_path) == {}
