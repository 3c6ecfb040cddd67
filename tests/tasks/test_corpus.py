import gzip
import json
import lzma
import warnings
from itertools import islice
from pathlib import Path

import datasets
import pandas as pd
import pytest

from polca_lib.tasks import corpus
from polca_lib.tasks.corpus import Article, DamagedCorpus, hub_config, is_validation, read_articles

ARTICLES = [
    Article("Émile Zola", "Zola était écrivain.\n\nŒuvre\nGerminal", "https://example.org/1"),
    Article("Emoji", "👩‍👩‍👧 is one of many.\r\nTwo lines.", "https://example.org/2"),
    Article("Empty", "", "https://example.org/3"),
]


def line(**record):
    return json.dumps(record).encode() + b"\n"


def jsonl(articles):
    return b"".join(line(id=str(i), **article._asdict()) for i, article in enumerate(articles))


def write(path, articles):
    if path.suffix == ".parquet":
        pd.DataFrame(articles).assign(id="7").to_parquet(path)
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(jsonl(articles)))
    else:
        path.write_bytes(jsonl(articles))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.parquet"])
def test_a_file_of_each_kind_gives_its_articles(tmp_path, name):
    path = write(tmp_path / name, ARTICLES)
    assert list(read_articles(path)) == ARTICLES
    assert list(read_articles(str(path))) == ARTICLES


def test_a_folder_is_read_by_name_whatever_the_kinds_and_what_else_is_in_it(tmp_path):
    for name, article in zip(["a.parquet", "b.jsonl", "c.jsonl.xz"], ARTICLES, strict=True):
        write(tmp_path / name, [article])
    (tmp_path / "README.md").write_text("no corpus")
    (tmp_path / "._b.jsonl").write_text("what some systems leave beside a file")
    assert list(read_articles(tmp_path)) == ARTICLES


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_url_may_be_missing(tmp_path, name):
    path, record = tmp_path / name, {"title": "A", "text": "b"}
    pd.DataFrame([record]).to_parquet(path) if path.suffix == ".parquet" else path.write_bytes(line(**record))
    assert list(read_articles(path)) == [Article("A", "b", "")]


def test_blank_lines_and_a_byte_order_mark_are_no_damage(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(title="A", text="b") + b"\r\n\n" + line(title="C", text="d").strip())
    assert [article.title for article in read_articles(path)] == ["A", "C"]


@pytest.mark.parametrize(
    "name", ["A.JSONL", "a.ndjson", "a.jsonl.gz", "a.JSONL.XZ", "a.json", "list.json", "list.JSON.gz", "a.PARQUET"]
)
def test_other_endings_are_read_alike(tmp_path, name):
    content = jsonl(ARTICLES)
    if name.startswith("list"):
        content = b"\xef\xbb\xbf" + json.dumps([article._asdict() for article in ARTICLES], indent=1).encode()
    path = tmp_path / name
    if name.endswith("PARQUET"):
        pd.DataFrame(ARTICLES).to_parquet(path)
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix.lower(), bytes)
        path.write_bytes(compress(content))
    assert list(read_articles(path)) == ARTICLES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"title": "A", "text": "b"}, null]', "item 2: it is not an object with title and text"),
        (b'[{"title": "A", "text": "b"}, {"title": "C"}]', "item 2: it has no text, but title"),
        (b'[{"title": "A"', "all of it: it is not JSON"),
        (b'{"title": "A",\n"text": "b"}', "line 1: it is not JSON"),
        ('[{"title": "Zoé", "text": "b"}]'.encode("latin-1"), "all of it: it is not UTF-8"),
    ],
)
def test_a_list_that_can_not_be_read_is_refused_by_its_item(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedCorpus, match=rf"a\.json, {reason}"):
        list(read_articles(tmp_path / "a.json"))


def test_gzip_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(ARTICLES))[:-12])
    with pytest.raises(DamagedCorpus, match=r"a\.jsonl\.gz, line \d+ and all after it: .*cut off"):
        list(read_articles(path))


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    long = Article("Long", "ten letters" * 10**6, "")
    assert list(read_articles(write(tmp_path / "a.jsonl", [long]))) == [long]


def test_nothing_after_what_is_consumed_is_looked_at(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ARTICLES) + b"no JSON\n")
    assert list(islice(read_articles(path), 3)) == ARTICLES


DAMAGE = {
    "not JSON": (b'{"title": "A", "text"\n', "it is not JSON"),
    "nested too deep": (b"[" * 200_000 + b"\n", "it is not JSON"),
    "not an object": (b"[1, 2]\n", "it is not an object .* of type list"),
    "no title": (line(text="b", name="A"), "it has no title, but text, name"),
    "no text": (line(title="A"), "it has no text, but title"),
    "empty": (b"{}\n", "it has no title, but nothing"),
    "title is a number": (line(title=1984, text="b"), "its title is not text, but of type int"),
    "text is null": (line(title="A", text=None), "its text is not text, but of type NoneType"),
    "not UTF-8": ('{"title": "A", "text": "é"}\n'.encode("latin-1"), "it is not UTF-8 .* at byte 24"),
    "half a surrogate pair": (b'{"title": "A", "text": "\\ud83d"}\n', "its text has half a surrogate pair"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_named_and_left_out_only_when_asked(tmp_path, content, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ARTICLES[:2]) + content + jsonl(ARTICLES[2:]))
    with pytest.raises(DamagedCorpus, match=rf"a\.jsonl, line 3: {reason}.*skip_damaged=True"):
        list(read_articles(path))
    damaged = []
    with pytest.warns(UserWarning, match=rf"damaged records left out: 1 .*line 3: {reason}") as caught:
        assert list(read_articles(path, skip_damaged=True, damaged=damaged)) == ARTICLES
    assert len(caught) == len(damaged) == 1


def test_one_warning_counts_all_that_is_damaged_and_names_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"no\n" * 4 + jsonl(ARTICLES))
    (tmp_path / "b.jsonl").write_bytes(b"no\n" * 4)
    with pytest.warns(UserWarning, match=r"left out: 8 \(") as caught:
        assert list(read_articles(tmp_path, skip_damaged=True)) == ARTICLES
    message = str(caught.pop().message)
    assert not caught.list
    assert [place in message for place in ("a.jsonl, line 4:", "b.jsonl, line 1:", "b.jsonl, line 2:")] == [1, 1, 0]
    assert message.endswith("and 3 more)")


def test_a_reader_that_is_closed_early_warns_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"no\n" + jsonl(ARTICLES))
    reader = read_articles(path, skip_damaged=True)
    next(reader)
    with pytest.warns(UserWarning, match="line 1"):
        reader.close()


def test_an_undamaged_corpus_gives_no_warning(tmp_path):
    path = write(tmp_path / "a.jsonl", ARTICLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_articles(path, skip_damaged=True)) == ARTICLES


def test_compressed_lines_that_are_cut_off_are_read_as_far_as_they_go(tmp_path):
    many = [Article(f"Number {i}", f"{i**7} " * 400, "") for i in range(300)]
    path = tmp_path / "a.jsonl.xz"
    content = lzma.compress(jsonl(many))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedCorpus, match=r"a\.jsonl\.xz, line \d+ and all after it: .*cut off"):
        list(read_articles(path))
    with pytest.warns(UserWarning, match="left out: 1 "):
        found = list(read_articles(path, skip_damaged=True))
    assert 0 < len(found) < 300
    assert found == many[: len(found)]


def test_a_file_that_is_not_compressed_at_all_is_refused(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(jsonl(ARTICLES))
    with pytest.raises(DamagedCorpus, match=r"line 1 and all after it: the compressed data"):
        list(read_articles(tmp_path))


def test_a_damaged_row_of_parquet_is_named(tmp_path):
    rows = [article._asdict() for article in ARTICLES[:2] * 50]
    rows[80]["text"] = None
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DamagedCorpus, match=r"a\.parquet, row 81: its text is not text, but of type NoneType"):
        list(read_articles(tmp_path))
    with pytest.warns(UserWarning, match="left out: 1 .*row 81"):
        assert len(list(read_articles(tmp_path, skip_damaged=True))) == 99


def test_missing_columns_of_parquet_are_named(tmp_path):
    pd.DataFrame({"id": [1], "body": ["b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        DamagedCorpus, match=r"a\.parquet, all rows: there is no column title and no column text, but id"
    ):
        list(read_articles(tmp_path))


def test_a_cut_off_parquet_file_is_named_and_the_others_are_read(tmp_path):
    whole = write(tmp_path / "b.parquet", ARTICLES)
    (tmp_path / "a.parquet").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DamagedCorpus, match=r"a\.parquet, row 1 and all after it: the file is not Parquet, cut off"):
        list(read_articles(tmp_path))
    with pytest.warns(UserWarning, match=r"a\.parquet"):
        assert list(read_articles(tmp_path, skip_damaged=True)) == ARTICLES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "is not there; allowed: .*jsonl.xz.*folder.*hub"),
        ("a.csv", "no kind that can be read; allowed: .jsonl, .ndjson, .json, .*.parquet"),
        ("folder", "is a folder with no file that can be read; allowed: .jsonl"),
    ],
)
def test_a_source_that_can_not_be_one_is_refused_before_anything_is_read(tmp_path, name, message):
    (tmp_path / "a.csv").write_text("title,text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        read_articles(tmp_path / name)


def test_an_unknown_configuration_of_the_hub_is_refused():
    with pytest.raises(ValueError, match=r"the hub has no '20220301.xx'; allowed: 20220301.en"):
        read_articles("hub:20220301.xx")


def test_a_folder_called_hub_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "a.jsonl", ARTICLES)
    monkeypatch.chdir(tmp_path)
    assert list(read_articles("./hub")) == list(read_articles(Path("hub"))) == ARTICLES
    assert [hub_config(source) for source in ("hub", "hubs", Path("hub"))] == ["20220301.en", None, None]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, with two files of each configuration; gives the names that were asked for."""
    original, asked = datasets.load_dataset, []
    rows = [{"id": str(i), **article._asdict()} for i, article in enumerate(ARTICLES)]
    pd.DataFrame(rows[:2]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    pd.DataFrame(rows[2:]).to_parquet(tmp_path / "train-00001-of-00002.parquet")

    def load_dataset(builder, *, data_files, **settings):
        asked.append(data_files)
        files = str(tmp_path / Path(data_files).name)
        return original(builder, data_files=files, cache_dir=str(tmp_path / "cache"), **settings)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(("source", "config"), [("hub", "20220301.en"), ("hub:20220301.simple", "20220301.simple")])
def test_the_hub_gives_its_articles(hub, source, config):
    reader = read_articles(source)
    assert not hub  # nothing is loaded before an article is asked for
    assert list(reader) == ARTICLES
    assert hub == [f"{corpus.HUB}/data/{config}/train-*.parquet"]


def test_a_hub_that_can_not_be_reached_says_what_to_do(monkeypatch):
    def load_dataset(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"no route to host.*give the path of a file or folder"):
        next(read_articles("hub"))


def test_validation_is_by_title_alone():
    articles = [Article(f"Title {i}", str(i), "") for i in range(20_000)]
    chosen = [is_validation(article) for article in articles]
    assert [is_validation(article._replace(text="else", url="else")) for article in articles] == chosen
    assert 340 < sum(chosen) < 460  # 400 expected; three standard deviations are 59


def test_validation_articles_are_fixed_for_ever():
    titles = [f"Title {i}" for i in range(300)]
    chosen = [title for title in titles if is_validation(Article(title, "", ""))]
    assert chosen == [f"Title {i}" for i in (98, 123, 135, 138, 166, 195, 276)]
