"""Training runs on the Hugging Face hub, such as Pythia's and OLMo's: each checkpoint is a revision."""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Subject, TokenLoss, describe_names
from polca_lib.storage.artefacts import DamagedFile, write_atomically
from polca_lib.storage.checkpoints import Checkpoints, file_sizes, flatten
from polca_lib.storage.documents import KINDS, ends_with, read_records
from polca_lib.storage.names import check_expressions, few, is_spare_buffer, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of a configuration that change the function and no shape.
_FUNCTION = re.compile(r"rope|rotary|eps|act|heads|window|scal|multiplier|parallel|softcap|norm|expert|layer_types")
# What stands before the step, but for an epoch.
_STAGE = re.compile(r"(?!epoch)(.+?)[-_](?:global[-_]?)?(?:step|iter)", re.IGNORECASE)


class _Revision(NamedTuple):
    name: str
    commit: str  # for a local folder: names and sizes of its files
    stage: str
    step: int


class HuggingFaceRevisions(Checkpoints):
    """Checkpoints that are revisions of a repository, downloaded one at a time.

    Revisions are named as by Pythia (``step0``, ``step1``, ... ``step143000``), OLMo (``step1000-tokens4B``), OLMo 2
    (``stage1-step1000-tokens5B``), or in any way that says the step (see :func:`polca_lib.storage.names.read_step`).
    transformers loads the weights, only from safetensors, and all of them must be there. What is in the cache of the
    hub is read without a network.

    Args:
        repo: repository such as ``EleutherAI/pythia-70m``, or a local folder with one subfolder per revision.
        token_loss: loss of the model that ``transformers`` builds for causal language modelling.
        revisions: names of the revisions to use; all that name a step by default.
        keep: whether to keep downloads in the cache of the hub.
        stage: stage of training, for names that have one; the first by default.
        pattern: regular expression to search in each name; its only group is the step.
        rename: see :class:`polca_lib.storage.checkpoint_folders.SafetensorsFolder`; for a model around that of
            transformers.

    Raises:
        ValueError: no revision names a step, it is not clear which number is the step, a requested revision is missing,
            or two have the same step.
        OSError: the repository is unknown or can't be reached.
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
        pattern: str | None = None,
        rename: Mapping[str, str] | None = None,
    ):
        check_expressions("rename", rename or {})
        self.repo, self.token_loss, self.device, self._keep = repo, token_loss, device, keep
        self._rename = dict(rename or {})
        selected, self._aside = _revisions(repo, revisions or None, pattern)
        if not selected:
            raise ValueError(f"{repo} has no revisions that name a step, such as step0 or step1000-tokens4B")
        # Select the revisions of one stage of training.
        stages = sorted({revision.stage for revision in selected})
        if stage is None and len(stages) > 1:
            self._aside += [f"stage {name}" for name in stages[1:]]
        stage = stages[0] if stage is None else stage
        if stage not in stages:
            raise ValueError(f"stage = {stage!r} is not in {repo}; allowed: {', '.join(stages)}")
        if self._aside and pattern is None:
            warnings.warn(f"left aside in {repo}: {few(self._aside)}", stacklevel=2)
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

    def notes(self) -> list[str]:
        """Revisions that were left aside."""
        return [f"left aside in {self.repo}: {few(self._aside)}"] if self._aside else []

    def theta(self, step: int) -> Float[Tensor, " d"]:
        from transformers import AutoModelForCausalLM

        revision = self._by_step[step]
        source = _source(self.repo, revision.name, revision.commit)
        # Download to a temporary cache if the files are not to be kept.
        keep = self._keep or Path(self.repo).is_dir()
        with nullcontext() if keep else tempfile.TemporaryDirectory() as cache:
            source |= {"cache_dir": cache, "use_safetensors": True}
            tensors = read_pretrained(self.name(step), AutoModelForCausalLM, source, self.token_loss)
            return flatten(self, step, tensors, self._rename)


def read_pretrained(name: str, model: Any, source: Mapping[str, Any], loss: TokenLoss) -> dict[str, Tensor]:
    """Let transformers read a checkpoint, and refuse it unless every weight of the model is there.

    Args:
        name: name of the checkpoint, for messages.
        model: class with ``from_pretrained``.
        source: its arguments that say where the checkpoint is.
        loss: loss of the model; its configuration is compared.

    Raises:
        DamagedFile: a file can't be read.
        ValueError: weights are missing, unknown, or have another shape; or the configuration is that of another
            function, such as another rotary base.
        OSError: a file is missing, or its download fails.
    """
    from safetensors import SafetensorError

    try:
        loaded, report = model.from_pretrained(
            **source, dtype=loss.dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise DamagedFile(f"{name} is damaged ({error})") from None
    except OSError as error:
        raise OSError(f"{name} can't be read: {' '.join(str(error).split())}") from None
    # transformers fills what is missing with random values. Tied to a parameter that is there, it is not missing.
    tensors = loaded.state_dict(keep_vars=True)
    missing, unknown = (set(report.pop(key, ())) for key in ("missing_keys", "unexpected_keys"))
    read = {id(parameter) for key, parameter in tensors.items() if key not in missing}
    missing = sorted(key for key in missing if key in tensors and id(tensors[key]) not in read)
    unknown = sorted(key for key in unknown if not is_spare_buffer(key))
    told = [f"{key}: {few(map(str, values))}" for key, values in report.items() if values]
    told += [describe_names(missing, unknown)] if missing or unknown else []
    if told:
        raise ValueError(f"{name} does not have the weights of the model: {'; '.join(told)}")
    # Weights of the same shapes may be those of another function.
    config, other = getattr(getattr(loss.model, "_orig_mod", loss.model), "config", None), loaded.config
    if type(config) is type(other):
        config, other = config.to_dict(), other.to_dict()
        fields = [field for field in other if _FUNCTION.search(field) and config.get(field) != other[field]]
        if fields:
            told = ", ".join(f"{field} = {other[field]!r}, not {config.get(field)!r}" for field in fields)
            raise ValueError(f"{name} has {told} of the model; build the model with its config, or leave it out")
    return {key: parameter.detach() for key, parameter in tensors.items()}


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
        texts: path of plain text, or of a file with documents under ``text``; see
            :func:`polca_lib.storage.documents.read_records`. In ``polca.toml`` it is relative to the file.
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
        local = _revisions(repo)[0] if Path(repo).is_dir() else []
        revision = min(local, key=lambda item: item.step).name if local else "main"
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


def _revisions(
    repo: str, names: Sequence[str] | None = None, pattern: str | None = None
) -> tuple[list[_Revision], list[str]]:
    """Revisions that name a step, and the names that are left aside."""
    commits = _commits(repo, names)
    steps, aside = steps_of(commits, repo, pattern, lenient=names is None)
    if names is not None and aside:
        raise ValueError(f"revisions = {few(aside)} of {repo} name no step; leave them out, or set another pattern")
    stages = {name: "" if pattern else (_STAGE.match(name) or [""] * 2)[1] for name in steps}
    revisions = [_Revision(name, commits[name], stages[name], step) for name, step in steps.items()]
    return revisions, [name for name in aside if name != "main"]


def _commits(repo: str, names: Sequence[str] | None) -> dict[str, str]:
    """Commits of branches and tags of the hub; for a local folder, sizes of files in its subfolders."""
    if Path(repo).is_dir():
        folders = {path.name: path for path in sorted(Path(repo).iterdir()) if path.is_dir() and path.name[0] != "."}
        if missing := [name for name in names or () if name not in folders]:
            listed = textwrap.shorten(", ".join(folders), 200, placeholder=" ...")
            raise ValueError(f"{repo} has no revision {missing[0]!r}; it has {listed}")
        chosen = {name: folders[name] for name in (names or folders)}
        return {name: file_sizes(sorted(filter(Path.is_file, path.iterdir())), path) for name, path in chosen.items()}
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    # The last list is kept in the cache of the hub, for use without a network.
    stored = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "polca-commits.json")
    known: dict[str, str] = json.loads(stored.read_text()) if stored.is_file() else {}
    try:
        # The cache has a folder for each commit.
        if names is not None:
            return {name: Path(hf_hub_download(repo, "config.json", revision=name)).parent.name for name in names}
        refs = HfApi().list_repo_refs(repo)
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo} lacks one of revisions = {few(names or ())}: {str(error).splitlines()[-1]}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(f"{repo} is neither a folder nor a repository that the hub shows you") from None
    except Exception as error:  # packages for HTTP have errors of their own
        if known and known.keys() >= set(names or ()):
            return {name: known[name] for name in names or known}
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "its revisions can't be listed; name in revisions what is in the cache" if names is None else few(names)
        raise ConnectionError(f"{repo} can't be reached and is not in the cache: {what} ({reason})") from None
    commits = {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}
    with suppress(OSError):
        stored.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(stored, json.dumps(commits).encode())
    return commits


def _source(repo: str, name: str, commit: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a revision of the hub or a local subfolder."""
    if Path(repo).is_dir():
        return {"pretrained_model_name_or_path": str(Path(repo) / name)}
    return {"pretrained_model_name_or_path": repo, "revision": commit}


def _windows(path: Path, tokenizer: PreTrainedTokenizerBase, n: int, width: int) -> Int[Tensor, "window position"]:
    """Cut the first ``n`` windows from the concatenated documents; each document ends with the end-of-text token."""
    if not path.is_file():
        raise FileNotFoundError(f"texts = {str(path)!r} is not a file")
    tokens: list[int] = []
    needed, documents = n * width, ends_with(path, KINDS)
    end = [tokenizer.eos_token_id] if documents and tokenizer.eos_token_id is not None else []
    for position, record in read_records(path, ["text"]):
        if len(tokens) >= needed:
            break
        if isinstance(record, str):
            raise ValueError(f"{path}, {position}: {record}")
        tokens += tokenizer(record["text"], add_special_tokens=False)["input_ids"] + end
    if len(tokens) < needed:
        raise ValueError(f"texts = {str(path)!r} has {len(tokens)} tokens; {n} windows of {width} take {needed}")
    return torch.tensor(tokens[:needed]).reshape(n, width)
