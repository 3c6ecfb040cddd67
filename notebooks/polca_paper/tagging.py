"""Parts of speech: spaCy tags words, and each token of a language model gets the tag of the word it begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int

if TYPE_CHECKING:
    from spacy.language import Language as Pipeline

    from polca_lib.tasks.language import Wikipedia

PAD, SPACE, OTHER = "PAD", "SPACE", "X"
"""Tags of tokens without text, of white space, and of words that a pipeline leaves untagged; all others are UPOS."""

BACK = 3
"""Tokens before the target whose tags count, three as in the paper."""

_LONGEST = 50_000  # characters that spaCy gets at once: its memory grows with them


class Words(NamedTuple):
    """Words of a text, in order and without overlap: each is ``text[start:end]`` and has a part of speech."""

    starts: Int[np.ndarray, " word"]
    ends: Int[np.ndarray, " word"]
    tags: np.ndarray


def load_pipeline(name: str | Path = "en_core_web_sm") -> Pipeline:
    """A spaCy pipeline that tags parts of speech.

    Named entities and lemmas are left out: they take time and change no tag. The parser stays: in English pipelines
    the rules that tell auxiliaries from verbs read it.

    Args:
        name: of an installed package, or the path of a folder.

    Raises:
        ValueError: there is no such pipeline, it can't be read, or it tags no parts of speech.
    """
    import spacy  # takes a second, and pages that only read kept results need no tagger

    example = name if str(name).isidentifier() else "en_core_web_sm"
    advice = f"install one by `python -m spacy download {example}`, or pass the path of a pipeline's folder"
    try:
        pipeline = spacy.load(name, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise ValueError(f"pipeline = '{name}' is no spaCy pipeline that can be loaded ({error}); {advice}") from None
    # What components declare to assign does not tell: spaCy's own attribute_ruler declares nothing.
    if not any(word.pos for word in pipeline("The old dog of a neighbour sleeps.")):
        parts = ", ".join(pipeline.pipe_names) or "none"
        raise ValueError(
            f"pipeline = '{name}' tags no parts of speech (its components: {parts}); allowed: one whose components set "
            f"token.pos, such as morphologizer, or tagger with attribute_ruler; {advice}"
        )
    return pipeline


def tag_texts(texts: Sequence[str], pipeline: Pipeline) -> list[Words]:
    """Words of each text, tagged paragraph by paragraph.

    A text is cut at newlines, and very long paragraphs also between words, because spaCy refuses long texts. White
    space is SPACE, whatever the pipeline says: pipelines differ.
    """
    longest = min(_LONGEST, pipeline.max_length)
    paragraph = re.compile(rf"[^\n]{{1,{longest}}}(?!\S)|[^\n]{{1,{longest}}}")
    passages = ((part.group(), (i, part.start())) for i, text in enumerate(texts) for part in paragraph.finditer(text))
    words: list[list[tuple[int, int, str]]] = [[] for _ in texts]
    for doc, (i, offset) in pipeline.pipe(passages, as_tuples=True, batch_size=128):
        for word in doc:
            start = offset + word.idx
            words[i].append((start, start + len(word), SPACE if word.is_space else word.pos_ or OTHER))
    columns = [zip(*of_text, strict=True) if of_text else ((), (), ()) for of_text in words]
    return [Words(np.array(s, np.int64), np.array(e, np.int64), np.array(t, str)) for s, e, t in columns]


def tag_tokens(
    text: str, starts: Int[np.ndarray, " token"], ends: Int[np.ndarray, " token"], words: Words
) -> np.ndarray:
    """Tag of each token: the tag of the word that has the token's first character other than white space.

    A token of white space alone is SPACE, a token without characters is PAD. If a character is split over several
    tokens, they share its span and its tag.

    Args:
        text: what was tokenized.
        starts, ends: a token is ``text[start:end]``.
        words: of ``text``, from :func:`tag_texts`.

    Returns:
        (token,) strings.

    Raises:
        ValueError: a span outside ``text``.
    """
    starts, ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    outside = (starts < 0) | (ends > len(text))
    if outside.any():
        i = int(outside.argmax())
        raise ValueError(
            f"token {i} spans characters {starts[i]} to {ends[i]}; allowed: 0 to {len(text)}, the length of its text"
        )
    visible = [i for i, character in enumerate(text) if not character.isspace()]
    visible = np.array([*visible, len(text)], np.int64)  # the end of the text lies in no token
    first = visible[np.searchsorted(visible, np.minimum(starts, len(text)))]
    # The last word that starts at or before the character. Index 0 stands for characters before all words.
    word = np.searchsorted(words.starts, first, side="right")
    covered = first < np.concatenate([[0], words.ends])[word]
    tags = np.where(covered, np.concatenate([[OTHER], words.tags])[word], OTHER)
    return np.select([starts >= ends, first >= ends], [PAD, SPACE], tags)


def tag_windows(task: Wikipedia, pipeline: Pipeline) -> np.ndarray:
    """Tags of all tokens of the validation windows, (window, width) strings.

    A window may begin and end within a sentence. So all paragraphs that it has a part of are tagged as a whole; this
    gives the same tags as the whole article.
    """
    corpus, rows = task.corpus, task.rows
    starts, ends = (np.asarray(part[rows], np.int64) for part in (corpus.starts, corpus.ends))
    passages, offsets = [], []
    for article, first, last in zip(corpus.article[rows], starts[:, 0], ends[:, -1], strict=True):
        text = corpus.articles[article].text
        offsets.append(text.rfind("\n", 0, first) + 1)
        end = text.find("\n", last)
        passages.append(text[offsets[-1] : end if end >= 0 else len(text)])
    words = tag_texts(passages, pipeline)
    windows = zip(passages, offsets, starts, ends, words, strict=True)
    return np.stack([tag_tokens(text, start - at, end - at, tagged) for text, at, start, end, tagged in windows])


def preceding_tags(tags: np.ndarray, positions: Sequence[int]) -> pd.DataFrame:
    """Tag of each target token and of the tokens before it in its window.

    Args:
        tags: (window, width) strings.
        positions: of the targets, the same in each window.

    Returns:
        A row per target, window by window: ``tag``, ``tag_1`` (of the token before), ``tag_2``, ``tag_3``; PAD before
        the start of the window.
    """
    positions = np.asarray(positions, np.int64)
    padded = np.concatenate([np.full((len(tags), BACK), PAD), tags], axis=1)
    columns = ["tag", *(f"tag_{back}" for back in range(1, BACK + 1))]
    return pd.DataFrame({name: padded[:, positions + BACK - back].ravel() for back, name in enumerate(columns)})
