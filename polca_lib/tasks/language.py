"""Windows of text, the loss of their tokens, and the two tasks that are made of them: a grammar and Wikipedia.

A window is ``n_ctx`` tokens. Its first two are read but not predicted, so that 100 windows of 128 tokens carry the
paper's 12,600 targets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_lib.storage.hashing import hash_json
from polca_lib.tasks import grammar
from polca_lib.tasks.prepared import PreparedCorpus, prepare_corpus
from polca_lib.tasks.settings import RunSettings
from polca_lib.tasks.tokenization import PAD, pack

CONTEXT = 2
"""Tokens at the start of a window that are read but not predicted."""


def next_token_loss(model: nn.Module, windows: Int[Tensor, "n width"]) -> Float[Tensor, " n*(width-2)"]:
    """Cross-entropy, in nats, of each token of a window but the first two, given all before it; example-major.

    PAD counts as any other token, as it does in the paper, whose Figures 10 and 12 show clusters of it.
    """
    logits = model(windows[:, :-1])[:, CONTEXT - 1 :]
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, CONTEXT:].flatten(), reduction="none")


class Language:
    """What the two tasks share (see :class:`polca_lib.tasks.task.Task`): batches, losses, a table of tokens."""

    groups = ()
    train: Int[np.ndarray, "window width"]
    validation: Int[Tensor, "window width"]
    vocabulary: Sequence[str]

    def __init__(self, settings: RunSettings):
        self._settings = settings

    def batch(self, step: int) -> Int[Tensor, "batch width"]:
        """Windows of update ``step``: each epoch takes all in an order of its own, drawn from the seed."""
        n, size = len(self.train), self._settings.training.batch_size
        taken = np.arange(step * size, (step + 1) * size)
        rows = [
            self._order(epoch)[taken[taken // n == epoch] % n] for epoch in range(taken[0] // n, taken[-1] // n + 1)
        ]
        return torch.from_numpy(self.train[np.concatenate(rows)].astype(np.int64))

    @cached_property
    def _order(self) -> Callable[[int], Int[np.ndarray, " window"]]:
        return cache(lambda epoch: np.random.default_rng([self._settings.seed, epoch]).permutation(len(self.train)))

    @staticmethod
    def loss(model: nn.Module, batch: Int[Tensor, "n width"]) -> Float[Tensor, " n*(width-2)"]:
        """See :func:`next_token_loss`."""
        return next_token_loss(model, batch)

    loss_of_all = loss

    @cached_property
    def texts(self) -> np.ndarray:
        """Text of each token of each validation window, (window, width)."""
        return np.array(self.vocabulary, dtype=object)[self.validation.numpy()]

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per target token, with ``example`` (window), ``position`` in it, ``id``, ``text``."""
        n, width = self.validation.shape
        targets = self.validation[:, CONTEXT:].flatten().numpy()
        return pd.DataFrame(
            {
                "example": np.repeat(np.arange(n), width - CONTEXT),
                "position": np.tile(np.arange(CONTEXT, width), n),
                "id": targets,
                "text": self.texts[:, CONTEXT:].ravel(),
            }
        )

    def _check_vocabulary(self, size: int, what: str) -> None:
        for name in ("d_vocab", "d_vocab_out"):
            value = getattr(self._settings.model, name)
            if value != size:
                raise ValueError(f"model.{name} = {value} does not fit {what}; allowed: {size}")


class Grammar(Language):
    """Text of :mod:`polca_lib.tasks.grammar`: every token has a known construction and part of speech."""

    vocabulary = grammar.VOCABULARY

    def __init__(self, settings: RunSettings):
        super().__init__(settings)
        self._check_vocabulary(len(self.vocabulary), "the vocabulary of the grammar")

    @cached_property
    def train(self) -> Int[np.ndarray, "window width"]:
        """As many windows as training takes. Each is seen once."""
        training = self._settings.training
        return self._windows(2, training.steps * training.batch_size)[0]

    @cached_property
    def _validation(self) -> list[np.ndarray]:
        return self._windows(0, self._settings.data.validation_examples)

    @property
    def validation(self) -> Int[Tensor, "window width"]:
        """Windows of documents that are not trained on."""
        return torch.from_numpy(self._validation[0])

    @cached_property
    def hessian(self) -> Int[Tensor, "window width"]:
        """Windows of documents of their own."""
        return torch.from_numpy(self._windows(1, self._settings.data.hessian_examples)[0])

    @property
    def tokens(self) -> pd.DataFrame:
        """With ``construction`` and ``tag``."""
        tags, constructions = (part[:, CONTEXT:].ravel() for part in self._validation[1:])
        names = np.array(list(grammar.CONSTRUCTIONS))[constructions]
        return super().tokens.assign(construction=names, tag=np.array(grammar.TAGS)[tags])

    @property
    def tags(self) -> np.ndarray:
        """Part of speech of each token of each validation window, (window, width)."""
        return np.array(grammar.TAGS)[self._validation[1]]

    @property
    def sources(self) -> None:
        """The grammar has none to name."""
        return None

    @property
    def description(self) -> str:
        """Where the text is from, in words."""
        return "generated by polca_lib.tasks.grammar"

    @property
    def identity(self) -> dict[str, str]:
        """A checksum of the grammar by what it generates."""
        rng = np.random.default_rng(0)
        return {"grammar": hashlib.sha256(b"".join(grammar.document(rng).ids.tobytes() for _ in range(20))).hexdigest()}

    def _windows(self, stream: int, n: int) -> list[Int[np.ndarray, "n width"]]:
        """Ids, tags and constructions of ``n`` windows of stream ``stream`` of the seed, in an order drawn from it."""
        rng = np.random.default_rng([self._settings.seed, stream])
        width, documents, enough = self._settings.model.n_ctx, [], 0
        # Of the small samples only some windows of a document are taken, so that they come from many.
        wanted = n if stream == 2 else 4 * n
        while enough < wanted:
            documents.append(grammar.document(rng))
            enough += -(-len(documents[-1].ids) // width)
        pads = (self.vocabulary.index(PAD), grammar.TAGS.index("PAD"), list(grammar.CONSTRUCTIONS).index("padding"))
        parts = [
            pack((getattr(one, name) for one in documents), width, pad)[0].astype(np.int64)
            for name, pad in zip(("ids", "tags", "constructions"), pads, strict=True)
        ]
        chosen = rng.permutation(len(parts[0]))[:n]
        return [part[chosen] for part in parts]


class Wikipedia(Language):
    """Articles of Wikipedia, cut into windows (see :mod:`polca_lib.tasks.prepared`)."""

    def __init__(self, settings: RunSettings, folder: Path):
        super().__init__(settings)
        self._folder = folder

    @cached_property
    def corpus(self) -> PreparedCorpus:
        """The corpus, prepared when first asked for and kept beside the runs."""
        corpus, model = self._settings.corpus, self._settings.model
        self._check_vocabulary(model.d_vocab, "model.d_vocab")
        source = corpus.source or os.environ.get("POLCA_WIKIPEDIA") or "hub"
        key = {**corpus.model_dump(), "source": source, "vocabulary": model.d_vocab, "width": model.n_ctx}
        return prepare_corpus(
            self._folder / f"corpus-{hash_json(key)[:12]}",
            source,
            vocabulary=model.d_vocab - 1,
            width=model.n_ctx,
            articles=corpus.articles,
            tokenizer_articles=corpus.tokenizer_articles,
            skip_damaged=corpus.skip_damaged,
        )

    @property
    def train(self) -> Int[np.ndarray, "window width"]:
        """All windows of training articles; trained on in epochs if there are fewer than updates take."""
        return self.corpus.train

    @cached_property
    def texts(self) -> np.ndarray:
        """Text of each token of each validation window, from its article, (window, width).

        Of the pieces of a character that is split over several tokens the first has it whole, and the others are empty.
        """
        corpus, texts = self.corpus, np.empty(self.validation.shape, dtype=object)
        for row, window in enumerate(self.rows):
            text, starts, ends = (
                corpus.articles[corpus.article[window]].text,
                corpus.starts[window],
                corpus.ends[window],
            )
            texts[row] = [text[start:end] for start, end in zip(starts, ends, strict=True)]
            texts[row, 1:][(starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1])] = ""
        texts[self.validation.numpy() == corpus.pad] = PAD
        return texts

    @cached_property
    def rows(self) -> Int[np.ndarray, " window"]:
        """Which windows of the validation articles are decomposed, drawn from the seed."""
        return self._draw(0, len(self.corpus.validation), self._settings.data.validation_examples, "validation")

    @cached_property
    def validation(self) -> Int[Tensor, "window width"]:
        """Windows of articles that are never trained on."""
        return torch.from_numpy(self.corpus.validation[self.rows].astype(np.int64))

    @cached_property
    def hessian(self) -> Int[Tensor, "window width"]:
        """Windows of training articles."""
        rows = self._draw(1, len(self.train), self._settings.data.hessian_examples, "hessian")
        return torch.from_numpy(self.train[rows].astype(np.int64))

    @property
    def sources(self) -> pd.DataFrame:
        """``title`` and ``url`` of the article that each validation window is from."""
        articles = [self.corpus.articles[i] for i in self.corpus.article[self.rows]]
        return pd.DataFrame({"title": [one.title for one in articles], "url": [one.url for one in articles]})

    @property
    def description(self) -> str:
        """The corpus in words, where it is from, how large, and its checksum."""
        corpus = self.corpus
        sizes = f"{corpus.counts.articles:,} training articles of {corpus.counts.tokens:,} tokens"
        return f"{corpus.source}, {sizes}, checksum {corpus.checksum[:12]}"

    @property
    def identity(self) -> dict[str, str]:
        """Checksum of the corpus."""
        return {"corpus": self.corpus.checksum}

    def _draw(self, stream: int, n: int, wanted: int, sample: str) -> Int[np.ndarray, " row"]:
        if wanted > n:
            raise ValueError(
                f"data.{sample}_examples = {wanted} is more than the {n} windows that the corpus has for it; "
                "lower it, or raise corpus.articles"
            )
        return np.sort(np.random.default_rng([self._settings.seed, stream]).permutation(n)[:wanted])
