"""Names that others chose: the step in the name of a checkpoint, and the parameters of the model in its content."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal

from torch import Tensor

from polca_lib.derivatives.token_loss import TokenLoss, describe_names

_SUFFIX = re.compile(r"\.(safetensors|pt|pth|bin|ckpt)$")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# A number with thousands separators, decimals, an exponent or a unit; the last two may make it no step.
_NUMBER = (
    r"(?:(?<=[=:])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?:[kmbt](?![a-z0-9]))?"
)
_ANY = re.compile(_NUMBER, re.IGNORECASE)
_LABELLED = re.compile(
    rf"(?<![a-z0-9])(?:global[_-]?)?(?:steps?|iter(?:ation)?s?)(?![a-z])[\s_]*[=:.-]?[\s_]*({_NUMBER})", re.IGNORECASE
)
# A number may go on, as in 1_000, 1'000 and 1k5; or count something else, as in seed-1 and warmup_steps-100.
_GOES_ON = re.compile(r"[,'.kmbt][0-9]|(?<![0-9]{4})[_ ][0-9]{3}(?![0-9])", re.IGNORECASE)
_OTHER = re.compile(
    r"(?<![a-z])(v|version|seed|rank|fold|run|part|shard|worker|trial|max|min|total|num|n|of|per|every|warmup|decay|grad|"
    r"accum|accumulation|eval|val|micro)[\s_=.-]*$",
    re.IGNORECASE,
)
_FINAL = re.compile(r"(?<![a-z])(best|last|latest|final)(?![a-z])", re.IGNORECASE)


def read_step(name: str) -> tuple[int | None, bool, list[str]]:
    """Read the step from a name: the number after ``step``, ``global_step``, ``iter`` or ``iteration``, else the only.

    ``1,000``, ``500k`` and ``1M`` are understood. Decimals, exponents and numbers that may go on are not steps.

    Returns:
        The step, if it is clear; whether it follows such a word; and all numbers of the name.
    """
    name = _SUFFIX.sub("", name)
    labelled = [m.span(1) for m in _LABELLED.finditer(name) if not _OTHER.search(name[: m.start()])]
    numbers = [m.span() for m in _ANY.finditer(name)]
    steps = set()
    for start, end in labelled or numbers:
        step = None if _GOES_ON.match(name, end) or _OTHER.search(name[:start]) else _whole_number(name[start:end])
        steps.add(step)
    clear = len(steps) == 1 and (labelled or len(numbers) == 1)
    return steps.pop() if clear else None, bool(labelled), [name[start:end] for start, end in numbers]


def _whole_number(text: str) -> int | None:
    """The integer that ``text`` says, such as ``1,000`` or ``1.5M``; none for anything else."""
    if not _ANY.fullmatch(text) or "e" in text.lower():
        return None
    unit = _UNITS.get(text[-1].upper(), 1)
    value = Decimal(text.rstrip("kmbtKMBT").replace(",", "")) * unit
    return int(value) if value == int(value) < 2**63 and ("." not in text or unit > 1) else None


def steps_of(
    names: Iterable[str], where: str, pattern: str | None = None, *, lenient: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Steps by name, and the names that are left aside: without a number, such as ``last``, or not of the pattern.

    Args:
        names: names of checkpoints.
        where: their folder or repository, for messages.
        pattern: regular expression to search in each name; its only group is the step.
        lenient: if some names say the step after a word such as ``step``, leave the others aside.

    Raises:
        ValueError: the pattern is not allowed, or it is not clear which number is the step.
    """
    names, steps, unclear = list(names), {}, []
    if pattern is not None:
        check_expressions("pattern", {pattern: ""})
        if (groups := re.compile(pattern).groups) != 1:
            raise ValueError(f"pattern = {pattern!r} has {groups} groups; allowed: one, the step")
        for name, match in ((name, re.search(pattern, name)) for name in names):
            if match and (step := _whole_number(match[1] or "")) is None:
                raise ValueError(
                    f"pattern = {pattern!r} finds {match[1]!r} in {name}; allowed: a whole number, the step"
                )
            steps |= {name: step} if match else {}
        if names and not steps:
            raise ValueError(f"pattern = {pattern!r} matches none of the names in {where}: {few(names)}")
        return steps, [name for name in names if name not in steps]
    # A word such as step decides. Without one, names must be alike but for their only number.
    readings = {name: read_step(name) for name in names}
    any_labelled = any(labelled and step is not None for step, labelled, _ in readings.values())
    for name, (step, labelled, numbers) in readings.items():
        if step is not None and labelled == any_labelled and (labelled or not _FINAL.search(name)):
            steps[name] = step
        elif numbers and (labelled or not _FINAL.search(name)):
            unclear.append(name)
    if not any_labelled and len({without_number(name) for name in steps}) > 1:
        steps, unclear = {}, unclear + list(steps)
    if (unclear and not (lenient and steps)) or (names and not steps):
        told = [f"{name} ({' or '.join(readings[name][2]) or 'no number'})" for name in unclear or names]
        # Propose a pattern around the first whole number.
        name = (unclear or names)[0]
        number = next((match for match in _ANY.finditer(name) if _whole_number(match[0]) is not None), None)
        before, after = (name[: number.start()], name[number.end() :]) if number else ("step-", "")
        example = re.search(r"[a-z_=-]*$", before, re.I)[0] + "([0-9]+)" + re.match(r"[a-z_-]*", after, re.I)[0]
        raise ValueError(
            f"the step is not clear from all names in {where}: {few(told)}"
            + ("; others have it after a word such as step" if any_labelled else "")
            + f". Set pattern, a regular expression whose only group is the step, such as {example!r}; names "
            "that it does not match are left aside"
        )
    _refuse_steps_of_epochs(steps, where)
    return steps, [name for name in names if name not in steps]


def without_number(name: str) -> str:
    """A name without its numbers and its ending, to tell which names are alike."""
    return _ANY.sub("", _SUFFIX.sub("", name))


def _refuse_steps_of_epochs(steps: Mapping[str, int], where: str) -> None:
    """Refuse steps that are counted anew in each epoch."""
    epochs = {name: match[1] for name in steps if (match := re.search(r"epochs?[=_-]?([0-9]+)", name, re.I))}
    if len(epochs) < len(steps):
        return
    ordered = sorted(steps, key=lambda name: steps[name])
    for before, after in itertools.pairwise(ordered):
        if int(epochs[before]) > int(epochs[after]):
            raise ValueError(
                f"{before} and {after} in {where} have a smaller step in a later epoch, so steps are counted in each "
                "epoch; rename them to the steps of the whole training, or set a pattern"
            )


def few(names: Iterable[str], most: int = 8) -> str:
    """The first names of a list, for messages."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_expressions(setting: str, expressions: Mapping[str, str]) -> None:
    """Check regular expressions and their replacements.

    Raises:
        ValueError: one of them is not valid.
    """
    for expression, replacement in expressions.items():
        try:
            re.sub(expression, replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{setting} = {expression!r} is not a valid regular expression: {error}") from None


class NamesDiffer(ValueError):
    """The parameters of a checkpoint have other names than those of the model."""


# Parts of names to remove wherever they stand: of DistributedDataParallel, torch.compile, FSDP. PEFT writes no names of
# adapters; torch's weight norm of old has other names than its parametrization.
_SPELLINGS = (
    (re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."), ""),
    (re.compile(r"\.(lora_\w+|ia3_\w+)\.(?!(?:weight|bias)$)\w+(?=\.|$)"), r".\1"),
    (re.compile(r"\.modules_to_save\.\w+(?=\.)"), ""),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original0$"), r"\1\2_g"),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original1$"), r"\1\2_v"),
)
# First parts of names that are removed if all names have them, such as those of Lightning modules.
_FRONT = {"module", "model", "net", "network", "base_model"}
# Buffers that models compute themselves, and may lack.
_SPARE = re.compile(r"(^|\.)(_extra_state|n_averaged|masked_bias|inv_freq|position_ids)$")
_MASK = re.compile(r"(attn|attention)\.bias$")


def is_spare_buffer(name: str, tensor: Tensor | None = None) -> bool:
    """Whether a tensor is a buffer of a known kind, such as a causal mask, that a model may lack."""
    mask = tensor is not None and tensor.ndim == 4 and tensor.shape[:2] == (1, 1) and _MASK.search(name)
    return bool(mask or _SPARE.search(name))


def align(
    tensors: Mapping[str, Tensor], loss: TokenLoss, rename: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors of a checkpoint the names that they have in the model; each must have exactly one.

    Args:
        tensors: content of the checkpoint.
        loss: loss of the model.
        rename: regular expressions and replacements, applied first to the names of the checkpoint, in order. A tensor
            whose name becomes empty is left out.

    Returns:
        Tensors by names of the model, and the names of buffers that the model lacks (see :func:`is_spare_buffer`).

    Raises:
        NamesDiffer: the model lacks a name of the checkpoint, or the checkpoint lacks a trainable parameter.
        ValueError: ``rename`` gives two tensors the same name.
    """
    renamed: dict[str, str] = {}
    for original in tensors:
        name = original
        for pattern, replacement in (rename or {}).items():
            name = re.sub(pattern, replacement, name)
        if renamed.setdefault(name, original) != original and name:
            raise ValueError(f"rename gives {renamed[name]!r} and {original!r} the same name {name!r}")
    renamed.pop("", None)
    # Compare the names as they are; then without wrappers; each also without fronts that all names of a side have.
    first_names, closest = loss.names, (list(loss.parameters), list(renamed))
    for clean in (str, _clean):
        sources, targets = _by_key(renamed, clean), _by_key(first_names, clean)
        spare = {key for key, name in sources.items() if is_spare_buffer(name, tensors[renamed[name]])}
        for front, other in ((a, b) for a in _fronts(targets) for b in _fronts(sources.keys() - spare)):
            pairs = {key: targets.get(front + key.removeprefix(other)) for key in sources}
            covered = {first_names[name] for name in pairs.values() if name}
            missing = [name for name in loss.parameters if name not in covered]
            unknown = [sources[key] for key, name in pairs.items() if not name and key not in spare]
            if not missing and not unknown:
                aligned = {name: tensors[renamed[sources[key]]] for key, name in pairs.items() if name}
                return aligned, [renamed[sources[key]] for key, name in pairs.items() if not name]
            closest = min(closest, (missing, unknown), key=lambda names: len(names[0] + names[1]))
    raise NamesDiffer(describe_names(*closest))


def _clean(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def _by_key(names: Mapping[str, str], clean: Callable[[str], str]) -> dict[str, str]:
    """Names by their clean form; none at all if names of different tensors have the same."""
    keys: dict[str, str] = {}
    ambiguous = any(names[keys.setdefault(clean(name), name)] != tensor for name, tensor in names.items())
    return {} if ambiguous else keys


def _fronts(names: Iterable[str], front: str = "") -> Iterator[str]:
    """Fronts that all names have and that may be removed: none, one part, two parts, and so on."""
    yield front
    heads = {name.removeprefix(front).split(".")[0] for name in names}
    if len(heads) == 1 and heads <= _FRONT:
        yield from _fronts(names, f"{front}{heads.pop()}.")
