"""Training runs on the Hugging Face hub, such as Pythia's and OLMo's: each checkpoint is a revision."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Subject, TokenLoss
from polca_lib.storage.artefacts import DamagedFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = re.compile(r"(?:(?P<stage>.+)-)?step(?P<step>\d+)(?:-tokens\d+B?)?")


class _Revision(NamedTuple):
    name: str
    commit: str  # or the folder, of a local one
    stage: str
    step: int


class HuggingFaceRevisions:
    """Checkpoints that are revisions of a repository, one downloaded at a time.

    Names are those of Pythia (``step0``, ``step1``, ... ``step143000``), OLMo (``step1000-tokens4B``) and OLMo 2
    (``stage1-step1000-tokens5B``). Weights are read as safetensors alone, through transformers.

    Args:
        repo: of the hub, such as ``EleutherAI/pythia-70m``; or a local folder whose folders are named like revisions.
        token_loss: of the model, as ``transformers`` builds it for causal language modelling.
        device: where parameter vectors are put.
        revisions: names of those to use; all that name a step if not given.
        keep: what is downloaded, in the cache of the hub; else it is dropped after use.
        stage: of training, where names have one; the first if not given.

    Raises:
        ValueError: no revision names a step, one named is not there, or there are two of one step.
    """

    def __init__(
        self,
        repo: str,
        token_loss: TokenLoss,
        device: str = "cpu",
        *,
        revisions: Sequence[str] | None = None,
        keep: bool = True,
        stage: str | None = None,
    ):
        self.repo, self.token_loss, self.device, self._keep = repo, token_loss, device, keep
        every = {one.name: one for one in _revisions(repo)}
        if not every:
            raise ValueError(f"{repo} has no revisions that name a step, such as step0 or step1000-tokens4B")
        if missing := [name for name in revisions or () if name not in every]:
            raise ValueError(f"{repo} has no revision {missing[0]!r} that names a step; it has {_few(sorted(every))}")
        chosen = [every[name] for name in revisions] if revisions else list(every.values())
        stages = sorted({one.stage for one in chosen})
        wanted = stages[0] if stage is None else stage
        if wanted not in stages:
            raise ValueError(f"stage = {stage!r} is not in {repo}; allowed: {', '.join(stages)}")
        self._by_step: dict[int, _Revision] = {}
        for one in chosen:
            if one.stage != wanted:
                continue
            if one.step in self._by_step:
                raise ValueError(f"{repo} has two revisions of step {one.step}; name those to use in revisions")
            self._by_step[one.step] = one

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in training order."""
        return sorted(self._by_step)

    def name(self, step: int) -> str:
        """Repository and revision of the checkpoint at ``step``."""
        return f"{self.repo}@{self._by_step[step].name}"

    def identity(self, step: int) -> str:
        """Commit of the revision at ``step``; of a local one, names and sizes of its files."""
        return self._by_step[step].commit

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``; what it takes is downloaded first.

        Raises:
            OSError: it can't be downloaded, or has no safetensors.
            DamagedFile: a local file can't be read.
            ValueError: the checkpoint is of another model.
        """
        if self._keep or Path(self.repo).is_dir():
            return self._load(step, None)
        with tempfile.TemporaryDirectory() as cache:
            return self._load(step, cache)

    def _load(self, step: int, cache: str | None) -> Float[Tensor, " d"]:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        one = self._by_step[step]
        place = {"pretrained_model_name_or_path": self.repo, "revision": one.commit, "cache_dir": cache}
        if Path(self.repo).is_dir():
            place = {"pretrained_model_name_or_path": str(Path(self.repo) / one.name)}
        try:
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=self.token_loss.dtype, use_safetensors=True)
        except SafetensorError as error:
            raise DamagedFile(f"{self.name(step)} is damaged ({error})") from None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        try:
            return self.token_loss.flatten({name: p.detach() for name, p in parameters.items()}).to(self.device)
        except ValueError as error:
            raise ValueError(f"{self.name(step)} does not fit the model: {error}") from None


def causal_lm(
    repo: str,
    texts: str,
    *,
    examples: int = 100,
    context: int = 512,
    hessian_examples: int = 50,
    revision: str | None = None,
) -> Subject:
    """A causal language model of the hub, and windows of a text: all that an analysis needs, without any code.

    Args:
        repo: of the hub, or a local folder, with a configuration and a tokenizer; see :class:`HuggingFaceRevisions`.
        texts: file of the text: ``.jsonl`` with a field ``text``, or else plain.
        examples: windows that are decomposed, the first of the text.
        context: tokens of a window; each but the first is a target.
        hessian_examples: windows for the Hessian, those that follow.
        revision: that has the configuration and the tokenizer; the main one if not given. Of a local folder, the first.

    Returns:
        The model, built from its configuration without weights being downloaded, its loss, windows, and a token table
        with ``text``, ``example`` and ``position``.

    Raises:
        ValueError: a number out of range, or a text that is too short.
        FileNotFoundError: there is no such text.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    least = {"examples": 1, "context": 2, "hessian_examples": 0}
    for name, value in {"examples": examples, "context": context, "hessian_examples": hessian_examples}.items():
        if value < least[name]:
            raise ValueError(f"{name} = {value}; allowed: {least[name]} or more")
    place = {"pretrained_model_name_or_path": repo, "revision": revision or "main"}
    if Path(repo).is_dir():
        first = revision or min(_revisions(repo), key=lambda one: one.step).name
        place = {"pretrained_model_name_or_path": str(Path(repo) / first)}
    config, tokenizer = AutoConfig.from_pretrained(**place), AutoTokenizer.from_pretrained(**place)
    windows = _windows(Path(texts), tokenizer, examples + hessian_examples, context)
    with init_empty_weights(include_buffers=False):  # weights come from checkpoints
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.tie_weights()
    own = windows[:examples]
    tokens = pd.DataFrame(
        {
            "text": [tokenizer.decode([token]) for token in own[:, 1:].flatten().tolist()],
            "example": np.repeat(np.arange(examples), context - 1),
            "position": np.tile(np.arange(1, context), examples),
        }
    )
    return Subject(model, next_token_losses, own, windows[examples:] if hessian_examples else None, tokens)


def next_token_losses(model: nn.Module, windows: Int[Tensor, "example position"]) -> Float[Tensor, " token"]:
    """The loss of every token but the first of its window, example-major, in nats."""
    # With a mask that hides nothing: without one, transformers looks for documents packed into a window.
    mask = torch.ones_like(windows)
    logits = model(input_ids=windows, attention_mask=mask, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def _revisions(repo: str) -> Iterator[_Revision]:
    """All that name a step: branches and tags of the hub, or folders."""
    if Path(repo).is_dir():
        found = {place.name: _listing(place) for place in sorted(Path(repo).iterdir()) if place.is_dir()}
    else:
        from huggingface_hub import HfApi

        refs = HfApi().list_repo_refs(repo)
        found = {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}
    for name, commit in found.items():
        if match := _NAME.fullmatch(name):
            yield _Revision(name, commit, match["stage"] or "", int(match["step"]))


def _listing(folder: Path) -> str:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return "; ".join(f"{file.name}: {file.stat().st_size}" for file in files)


def _windows(file: Path, tokenizer: PreTrainedTokenizerBase, n: int, width: int) -> Int[Tensor, "window position"]:
    """The first ``n`` windows of a text, its documents one after another, each closed by the end-of-text token."""
    if not file.is_file():
        raise FileNotFoundError(f"texts = {str(file)!r} is no file")
    tokens: list[int] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(tokens) >= n * width:
                break
            if file.suffix == ".jsonl":
                try:
                    line = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}, line {number}, has no field 'text' ({error!r})") from None
            tokens += tokenizer(line, add_special_tokens=False)["input_ids"]
            if file.suffix == ".jsonl" and tokenizer.eos_token_id is not None:
                tokens.append(tokenizer.eos_token_id)
    if len(tokens) < n * width:
        raise ValueError(f"texts = {str(file)!r} has {len(tokens)} tokens; {n} windows of {width} take {n * width}")
    return torch.tensor(tokens[: n * width]).reshape(n, width)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:7], "..."])
