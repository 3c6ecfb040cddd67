"""<grad L(x), b> for all tokens x and vectors b: ours against the ways there are, at the same point and in one process.

python benchmarks/projections.py --sizes smoke laptop paper --repeats 5
"""

from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import harness
import torch
from harness import GIB, Trial
from linear_model import LinearModel
from peers import LEAST_TARGETS, PEERS, Loss, Problem, peer_trial
from torch import Tensor, nn

from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import ENGLISH, build_model
from polca_lib.tasks.settings import ModelSettings, RunSettings

SCALED = ("vmap(grad)", "jvp, one by one", "vmap(jvp)")  # the peers whose growth is followed
LANGUAGE = {  # model, sequences, vectors
    "smoke": (ModelSettings(n_layers=1, d_model=32, d_mlp=64, n_ctx=16, d_vocab=100, d_vocab_out=100), 4, 5),
    "laptop": (ModelSettings(d_model=128, d_mlp=512, n_ctx=128, d_vocab=1000, d_vocab_out=1000), 16, 15),
    "paper": (ENGLISH, 2, 16),
}
SCALING = {  # where one axis varies, and where the two others stay
    "smoke": ({"tokens": (16, 64), "vectors": (1, 4)}, {"tokens": 16, "vectors": 4, "d_model": 32}),
    "laptop": (
        {"tokens": (64, 256, 1024), "vectors": (1, 8, 64), "d_model": (64, 128, 256)},
        {"tokens": 256, "vectors": 16, "d_model": 128},
    ),
}
LIMITS = {"smoke": 0.05, "laptop": 1, "paper": 3}  # seconds or so that one turn of a peer may take
BUDGETS = {"smoke": (0.0625,), "laptop": (0.125, 0.5), "paper": (1,)}  # GiB
PROFILED = 256  # examples of the addition task
_KINDS = {"aten::mm": "products (mm)", "aten::bmm": "batched products (bmm)", "aten::copy_": "copies"}


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of every token but the first, given all before it."""
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def addition(config: ModelSettings, examples: int, vectors: int, device: str, linear: bool = False) -> Problem:
    """Answer tokens of three-digit sums; T = 12, four targets an example."""
    pairs = arithmetic.sample_pairs(0, examples, 0, 0).validation
    return _problem(
        config, arithmetic.answer_loss, arithmetic.encode(pairs), vectors, arithmetic.N_ANSWER, device, linear
    )


def language(config: ModelSettings, examples: int, vectors: int, device: str) -> Problem:
    """Random text: every position is a target."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.d_vocab, (examples, config.n_ctx + 1), generator=generator)
    return _problem(config, next_token_loss, text, vectors, config.n_ctx, device, linear=False)


def _problem(
    config: ModelSettings, loss: Loss, batch: Tensor, vectors: int, targets: int, device: str, linear: bool
) -> Problem:
    torch.manual_seed(0)
    model = LinearModel(config).to(device) if linear else build_model(config, 0, device)
    token_loss = TokenLoss(model, loss)
    directions = torch.randn(vectors, token_loss.n_parameters, device=device)
    directions /= directions.norm(dim=1, keepdim=True)
    theta = token_loss.flatten(token_loss.parameters)
    return Problem(token_loss, loss, theta, batch.to(device), directions, targets)


def preset_problem(size: str, device: str, linear: bool = False) -> Problem:
    """The addition task with the model, the validation examples and as many vectors as the basis of a preset."""
    config = RunSettings.from_preset(size)
    return addition(config.model, config.data.validation_examples, config.n_vectors, device, linear)


def our_trial(problem: Problem, precision: str) -> Trial:
    """The library as the pipeline calls it, on all tokens: the strategy is chosen once, as the peers' blocks are."""
    point = (problem.token_loss, problem.theta, problem.batch, problem.vectors)
    strategy = choose(*point, precision=precision)
    return Trial(
        lambda: project(*point, precision=precision, strategy=strategy).gradient,
        problem.tokens,
        getattr(torch, strategy.precision),
        {"tokens_timed": problem.tokens, "mode": strategy.mode},
    )


def exact(problem: Problem) -> Tensor:
    """Float64 by brute force, one backward pass a token, for the first tokens."""
    token_loss = TokenLoss(copy.deepcopy(problem.token_loss.model).double(), problem.loss)
    first = problem.cut(examples=math.ceil(LEAST_TARGETS / problem.targets), targets=LEAST_TARGETS)
    theta = problem.theta.double().requires_grad_()
    losses = dataclasses.replace(first, token_loss=token_loss).losses(theta, first.batch).flatten()[:LEAST_TARGETS]
    gradients = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses])
    return torch.stack([gradients @ vector.double() for vector in problem.vectors], dim=1)


def ask(
    question: str,
    setting: str,
    problem: Problem,
    peers: Iterable[str],
    *,
    repeats: int,
    device: str,
    limit: float,
    with_rate: bool = False,
    **keys: str | int,
) -> list[harness.Record]:
    """All contenders on one problem; times are seconds a token."""
    expected = exact(problem)

    def error(result: Tensor) -> harness.Record:
        common = min(len(result), len(expected))
        difference = result[:common].double() - expected[:common]
        return {"max_error": float(difference.abs().max() / expected.square().mean().sqrt())}

    contenders = {name: lambda name=name: peer_trial(name, problem, limit, device) for name in peers}
    # Forward mode is never rounded: there the two are the same.
    both = choose(problem.token_loss, problem.theta, problem.batch, problem.vectors).mode == "reverse"
    for precision in ("float32", "bfloat16") if both else ("float32",):
        contenders[f"ours, {precision}"] = lambda precision=precision: our_trial(problem, precision)
    sizes = {
        "unit": "s a token",
        "tokens": problem.tokens,
        "vectors": len(problem.vectors),
        "parameters": problem.token_loss.n_parameters,
    }
    return harness.compare(
        question,
        setting,
        contenders,
        ours="ours, float32",
        repeats=repeats,
        device=device,
        examine=error,
        with_rate=with_rate,
        **sizes,
        **keys,
    )


def main_settings(size: str, device: str) -> Iterator[tuple[str, str, Problem, Iterable[str]]]:
    """Name, task, problem and peers of each setting of a size."""
    for linear in (False, True):
        problem, peers = preset_problem(size, device, linear), PEERS
        if linear and size == "paper" and device == "cpu":
            # Both models have the same matrices; this one is for the peer that does not do the other.
            problem, peers = problem.cut(examples=64), ("opacus",)
        task = "addition, nn.Linear" if linear else "addition"
        yield f"{task}, {size}, {len(problem.batch)} examples", task, problem, peers
    config, sequences, vectors = LANGUAGE[size]
    yield (
        f"language, {size}, {sequences} x {config.n_ctx} tokens",
        "language",
        language(config, sequences, vectors, device),
        PEERS,
    )


def scaling_settings(size: str, device: str) -> Iterator[tuple[str, str, int, Problem]]:
    """Name, axis, value and problem of each point: one of tokens, vectors and width varies."""
    axes, fixed = SCALING[size]
    for axis, values in axes.items():
        for value in values:
            at = {**fixed, axis: value}
            width = {"d_model": at["d_model"], "d_mlp": 4 * at["d_model"]}
            config = RunSettings.from_preset(size).model.model_copy(update=width)
            problem = addition(config, at["tokens"] // arithmetic.N_ANSWER, at["vectors"], device)
            yield f"{size}, {axis} {value}", axis, value, problem


def peak_memory(size: str, budget: float, precision: str, device: str, threads: int) -> tuple[int, float]:
    """Growth in bytes, and seconds, of one call that may take ``budget`` GiB; to be called in a process of its own."""
    torch.set_num_threads(threads)
    problem = preset_problem(size, device)

    def call(part: Problem) -> None:
        project(part.token_loss, part.theta, part.batch, part.vectors, precision=precision, memory=int(budget * GIB))

    call(problem.cut(examples=1, vectors=1))
    with harness.PeakMemory(device) as peak:
        time = harness.seconds(lambda: call(problem), device)
    return peak.growth, time / problem.tokens


def memory_records(size: str, budget: float, device: str) -> list[harness.Record]:
    """Memory taken against memory given, for both precisions."""
    records = []
    for precision in ("float32", "bfloat16"):
        record = {
            "question": "memory",
            "setting": f"addition, {size}, {budget} GiB",
            "contender": f"ours, {precision}",
            **dict.fromkeys(("median_s", "low_s", "high_s", "ratio_to_ours")),
            "unit": "s a token",
            "repeats": 1,
            "size": size,
            "budget_bytes": int(budget * GIB),
            **harness.provenance(device),
        }
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                growth, time = pool.submit(
                    peak_memory, size, budget, precision, device, torch.get_num_threads()
                ).result()
            record |= dict.fromkeys(("median_s", "low_s", "high_s"), time)
            record |= {"peak_bytes": growth, "ratio_to_budget": growth / record["budget_bytes"]}
        except Exception as error:
            record["error"] = harness.describe(error)
        print(f"memory: {record['setting']}, {precision}: {record.get('ratio_to_budget')}", file=sys.stderr)
        records.append(record)
    return records


def profile_records(size: str, device: str) -> list[harness.Record]:
    """Where the time of one call goes: seconds a token by part of reverse mode and kind of operation."""
    problem = preset_problem(size, device).cut(examples=PROFILED)
    records = []
    for precision in ("float32", "bfloat16"):
        trial = our_trial(problem, precision)
        trial.run()
        with torch.profiler.profile() as profile:
            trial.run()
        spent: dict[str, float] = {}
        for event in profile.events():
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # what ran there is counted where it was started
            place = event
            while place is not None and place.name not in ("signals", "project_signals"):
                place = place.cpu_parent
            kind = f"{place.name if place else 'around them'}: {_KINDS.get(event.name, 'all else')}"
            own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
            spent[kind] = spent.get(kind, 0.0) + own / 1e6
        for kind, time in sorted(spent.items(), key=lambda item: -item[1]):
            records.append(
                {
                    "question": "profile",
                    "setting": f"addition, {size}, {precision}",
                    "contender": kind,
                    **dict.fromkeys(("median_s", "low_s", "high_s"), time / problem.tokens),
                    "ratio_to_ours": time / sum(spent.values()),
                    "repeats": 1,
                    "unit": "s a token",
                    "size": size,
                    **harness.provenance(device),
                }
            )
    return records


def main() -> None:
    """Command line."""
    arguments = harness.arguments(__doc__).parse_args()
    for size in arguments.sizes:
        common = {"repeats": arguments.repeats, "device": arguments.device, "limit": LIMITS[size]}
        for setting, task, problem, peers in main_settings(size, arguments.device):
            records = ask("projections", setting, problem, peers, with_rate=True, size=size, task=task, **common)
            harness.write(arguments.out, records)
        if size in SCALING:
            for setting, axis, value, problem in scaling_settings(size, arguments.device):
                records = ask("scaling", setting, problem, SCALED, size=size, axis=axis, value=value, **common)
                harness.write(arguments.out, records)
        harness.write(arguments.out, profile_records(size, arguments.device))
        for budget in BUDGETS[size]:
            harness.write(arguments.out, memory_records(size, budget, arguments.device))


if __name__ == "__main__":
    main()
