"""Training runs on the Hugging Face hub, such as Pythia's and OLMo's: each checkpoint is a revision."""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Subject, TokenLoss
from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.checkpoints import Checkpoints, file_sizes, flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = re.compile(r"(?:(?P<stage>.+)-)?step(?P<step>\d+)(?:-tokens\d+B?)?")


class _Revision(NamedTuple):
    name: str
    commit: str  # for a local folder: names and sizes of its files
    stage: str
    step: int


class HuggingFaceRevisions(Checkpoints):
    """Checkpoints that are revisions of a repository, downloaded one at a time.

    Revisions are named as by Pythia (``step0``, ``step1``, ... ``step143000``), OLMo (``step1000-tokens4B``) or OLMo 2
    (``stage1-step1000-tokens5B``). transformers loads the weights, only from safetensors.

    Args:
        repo: repository such as ``EleutherAI/pythia-70m``, or a local folder with one subfolder per revision.
        token_loss: loss of the model that ``transformers`` builds for causal language modelling.
        revisions: names of the revisions to use; all that name a step by default.
        keep: whether to keep downloads in the cache of the hub.
        stage: stage of training, for names that have one; the first by default.

    Raises:
        ValueError: no revision names a step, a requested revision is missing, or two have the same step.
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
        available = {revision.name: revision for revision in _revisions(repo)}
        if not available:
            raise ValueError(f"{repo} has no revisions that name a step, such as step0 or step1000-tokens4B")
        if missing := [name for name in revisions or () if name not in available]:
            names = textwrap.shorten(", ".join(sorted(available)), 200, placeholder=" ...")
            raise ValueError(f"{repo} has no revision {missing[0]!r} that names a step; it has {names}")
        # Select the revisions of one stage of training.
        selected = [available[name] for name in revisions or available]
        stages = sorted({revision.stage for revision in selected})
        stage = stages[0] if stage is None else stage
        if stage not in stages:
            raise ValueError(f"stage = {stage!r} is not in {repo}; allowed: {', '.join(stages)}")
        self._by_step: dict[int, _Revision] = {}
        for revision in selected:
            if revision.stage != stage:
                continue
            if revision.step in self._by_step:
                raise ValueError(f"{repo} has two revisions of step {revision.step}; name those to use in revisions")
            self._by_step[revision.step] = revision

    @property
    def steps(self) -> list[int]:
        return sorted(self._by_step)

    def name(self, step: int) -> str:
        return f"{self.repo}@{self._by_step[step].name}"

    def identity(self, step: int) -> str:
        return self._by_step[step].commit

    def at_hand(self, step: int) -> bool:
        """Whether the revision is in a local folder, or in the cache of the hub."""
        if Path(self.repo).is_dir():
            return True
        from huggingface_hub import try_to_load_from_cache as cached

        commit, names = self._by_step[step].commit, ("model.safetensors", "model.safetensors.index.json")
        return self._keep and any(isinstance(cached(self.repo, name, revision=commit), str) for name in names)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        revision = self._by_step[step]
        source = _source(self.repo, revision.name, revision.commit)
        options = {"dtype": self.token_loss.dtype, "use_safetensors": True}
        # Download to a temporary cache if the files are not to be kept.
        keep = self._keep or Path(self.repo).is_dir()
        with nullcontext() if keep else tempfile.TemporaryDirectory() as cache:
            try:
                model = AutoModelForCausalLM.from_pretrained(**source, **options, cache_dir=cache)
            except SafetensorError as error:
                raise DamagedFile(f"{self.name(step)} is damaged ({error})") from None
            # Tied parameters occur under each of their names.
            parameters = model.named_parameters(remove_duplicate=False)
            return flatten(self, step, {name: parameter.detach() for name, parameter in parameters})


def causal_lm(
    repo: str,
    texts: str,
    *,
    examples: int = 100,
    context: int = 512,
    hessian_examples: int = 50,
    revision: str | None = None,
) -> Subject:
    """Set up the analysis of a causal language model of the hub on windows of a text.

    The model is built from its configuration, without downloading weights.

    Args:
        repo: repository or local folder with a configuration and a tokenizer; see :class:`HuggingFaceRevisions`.
        texts: path of a text file, or of a ``.jsonl`` file with a field ``text``.
        examples: number of windows to decompose, from the start of the text.
        context: tokens per window; each except the first is a target.
        hessian_examples: number of windows for the Hessian, which follow the others.
        revision: revision of the configuration and the tokenizer; by default ``main``, or the first of a local folder.

    Returns:
        The model, its loss, the windows, and a token table with ``text``, ``example`` and ``position``.

    Raises:
        ValueError: a number is out of range, or the text is too short.
        FileNotFoundError: the text file is missing.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    limits = ("examples", examples, 1), ("context", context, 2), ("hessian_examples", hessian_examples, 0)
    for name, value, least in limits:
        if value < least:
            raise ValueError(f"{name} = {value}; allowed: {least} or more")
    # Load configuration and tokenizer.
    if not revision:
        revision = min(_revisions(repo), key=lambda item: item.step).name if Path(repo).is_dir() else "main"
    source = _source(repo, revision, revision)
    config, tokenizer = AutoConfig.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
    windows = _windows(Path(texts), tokenizer, examples + hessian_examples, context)
    # Build the model without weights: they come from checkpoints.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.tie_weights()
    # Split the windows and describe each target token.
    validation, hessian = windows[:examples], windows[examples:] if hessian_examples else None
    text = [tokenizer.decode([token]) for token in validation[:, 1:].flatten().tolist()]
    example, position = np.repeat(np.arange(examples), context - 1), np.tile(np.arange(1, context), examples)
    tokens = pd.DataFrame({"text": text, "example": example, "position": position})
    return Subject(model, next_token_losses, validation, hessian, tokens)


def next_token_losses(model: nn.Module, windows: Int[Tensor, "example position"]) -> Float[Tensor, " token"]:
    """Cross-entropy of every token except the first of its window, example-major, in nats."""
    # Pass a full mask: without one, transformers searches each window for packed documents.
    mask = torch.ones_like(windows)
    logits = model(input_ids=windows, attention_mask=mask, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def _revisions(repo: str) -> Iterator[_Revision]:
    """Yield all branches and tags of the hub, or subfolders, that name a step."""
    if Path(repo).is_dir():
        folders = sorted(path for path in Path(repo).iterdir() if path.is_dir())
        commits = {path.name: file_sizes(sorted(filter(Path.is_file, path.iterdir())), path) for path in folders}
    else:
        from huggingface_hub import HfApi

        refs = HfApi().list_repo_refs(repo)
        commits = {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}
    for name, commit in commits.items():
        if match := _NAME.fullmatch(name):
            yield _Revision(name, commit, match["stage"] or "", int(match["step"]))


def _source(repo: str, name: str, commit: str) -> dict[str, str]:
    """Arguments of ``from_pretrained`` for a revision of the hub or a local subfolder."""
    if Path(repo).is_dir():
        return {"pretrained_model_name_or_path": str(Path(repo) / name)}
    return {"pretrained_model_name_or_path": repo, "revision": commit}


def _windows(path: Path, tokenizer: PreTrainedTokenizerBase, n: int, width: int) -> Int[Tensor, "window position"]:
    """Cut the first ``n`` windows from the concatenated documents; each document ends with the end-of-text token."""
    if not path.is_file():
        raise FileNotFoundError(f"texts = {str(path)!r} is no file")
    tokens: list[int] = []
    needed, documents = n * width, path.suffix == ".jsonl"
    end = [tokenizer.eos_token_id] if documents and tokenizer.eos_token_id is not None else []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(tokens) >= needed:
                break
            try:
                text = json.loads(line)["text"] if documents else line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, has no field 'text' ({error!r})") from None
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"] + end
    if len(tokens) < needed:
        raise ValueError(f"texts = {str(path)!r} has {len(tokens)} tokens; {n} windows of {width} take {needed}")
    return torch.tensor(tokens[:needed]).reshape(n, width)
