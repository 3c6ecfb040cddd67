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
"""Tags of tokens that stand for no text, of white space, and of what a pipeline leaves untagged; else they are UPOS."""
BACK = 3
"""Tokens before the target whose tags count, three as in the paper."""

_LONGEST = 50_000  # characters that spaCy is given at once: its memory grows with them


class Words(NamedTuple):
    """Words of a text, in order, without overlap: ``text[start:end]`` and their parts of speech."""

    starts: Int[np.ndarray, " word"]
    ends: Int[np.ndarray, " word"]
    tags: np.ndarray


def load_pipeline(name: str | Path = "en_core_web_sm") -> Pipeline:
    """A spaCy pipeline that tags parts of speech.

    Named entities and lemmas are left out, for they take time and change no tag. The parser stays: in English
    pipelines rules that tell auxiliaries from verbs read it.

    Args:
        name: of an installed package, or the path of a folder.

    Raises:
        ValueError: there is no such pipeline, it can't be read, or it tags no parts of speech.
    """
    # Imported here because it takes a second, and pages that only read stored results need no tagger.
    import spacy

    example = name if str(name).isidentifier() else "en_core_web_sm"
    advice = f"install one by `python -m spacy download {example}`, or pass the path of a pipeline's folder"
    try:
        pipeline = spacy.load(name, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise ValueError(f"pipeline = '{name}' is no spaCy pipeline that can be loaded ({error}); {advice}") from None
    # What a component declares that it assigns does not tell: spaCy's own attribute_ruler declares nothing.
    if not any(word.pos for word in pipeline("The old dog of a neighbour sleeps.")):
        parts = ", ".join(pipeline.pipe_names) or "none"
        raise ValueError(
            f"pipeline = '{name}' tags no parts of speech (its components: {parts}); allowed: one whose components set "
            f"token.pos, such as morphologizer, or tagger with attribute_ruler; {advice}"
        )
    return pipeline


def tag_texts(texts: Sequence[str], pipeline: Pipeline) -> list[Words]:
    """Words of each text, tagged paragraph by paragraph.

    A text is cut at newlines, and a paragraph that is very long also between words, because spaCy refuses long texts.
    White space is SPACE, whatever the pipeline says: pipelines differ.
    """
    longest = min(_LONGEST, pipeline.max_length)
    paragraph = re.compile(rf"[^\n]{{1,{longest}}}(?!\S)|[^\n]{{1,{longest}}}")
    passages = ((one.group(), (i, one.start())) for i, text in enumerate(texts) for one in paragraph.finditer(text))
    found: list[list[tuple[int, int, str]]] = [[] for _ in texts]
    for doc, (i, offset) in pipeline.pipe(passages, as_tuples=True, batch_size=128):
        for word in doc:
            start = offset + word.idx
            found[i].append((start, start + len(word), SPACE if word.is_space else word.pos_ or OTHER))
    return [
        Words(*(np.array([word[part] for word in words], kind) for part, kind in enumerate((np.int64, np.int64, str))))
        for words in found
    ]


def tag_tokens(
    text: str, starts: Int[np.ndarray, " token"], ends: Int[np.ndarray, " token"], words: Words
) -> np.ndarray:
    """Tag of each token: that of the word with the token's first character that is no white space.

    A token of nothing but white space is SPACE, one of no characters at all is PAD. Pieces of a character that is
    split over several tokens share its span, and its tag.

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
    # Past the last visible character stands the end of the text, which lies in no token.
    visible = np.array([*visible, len(text)], np.int64)
    first = visible[np.searchsorted(visible, np.minimum(starts, len(text)))]
    # The word that starts last of those up to the character; one more, at the front, for characters before all words.
    word = np.searchsorted(words.starts, first, side="right")
    covered = first < np.concatenate([[0], words.ends])[word]
    tags = np.where(covered, np.concatenate([[OTHER], words.tags])[word], OTHER)
    return np.select([starts >= ends, first >= ends], [PAD, SPACE], tags)


def tag_windows(task: Wikipedia, pipeline: Pipeline) -> np.ndarray:
    """Tags of all tokens of the validation windows, (window, width) strings.

    A window may begin and end within a sentence, so that whole paragraphs are tagged: those it has a part of. These
    give the tags that the whole article would.
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
    return np.stack(
        [
            tag_tokens(passage, start - offset, end - offset, own)
            for passage, offset, start, end, own in zip(passages, offsets, starts, ends, words, strict=True)
        ]
    )


def preceding_tags(tags: np.ndarray, positions: Sequence[int]) -> pd.DataFrame:
    """Tag of each target token and of the tokens before it in its window.

    Args:
        tags: (window, width) strings.
        positions: of the targets, the same in each window.

    Returns:
        A row per target, window by window: ``tag``, ``tag_1`` (of the token before), ``tag_2``, ``tag_3``; PAD where
        the window has none.

    Raises:
        ValueError: tags of other than two dimensions, or a position outside the window.
    """
    tags, positions = np.asarray(tags), np.asarray(positions, np.int64)
    if tags.ndim != 2:
        raise ValueError(f"tags have shape {tags.shape}; allowed: (window, width)")
    if outside := [int(p) for p in positions if not 0 <= p < tags.shape[1]]:
        raise ValueError(f"positions = {outside} are outside the window; allowed: 0 to {tags.shape[1] - 1}")
    padded = np.concatenate([np.full((len(tags), BACK), PAD), tags], axis=1)
    columns = ["tag", *(f"tag_{back}" for back in range(1, BACK + 1))]
    return pd.DataFrame({name: padded[:, positions + BACK - back].ravel() for back, name in enumerate(columns)})
