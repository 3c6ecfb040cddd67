"""The top eigenpair of the Hessian of the mean loss, to the same residual; the bare product; and a whole basis.

    python benchmarks/eigenvector.py --sizes smoke laptop paper --repeats 5

Whatever a library means by its tolerance or number of iterations, it gets the setting that costs it the fewest products
and still meets the residual, measured on its result in float64. In the whole basis (Algorithm 1) each vector is the top
one of P H P, with P the projection off the contender's own vectors so far. There all iterations of Lanczos get the same
number of products, the fewest that bring the residual of ours to 1%.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import cola
import harness
import scipy.sparse.linalg
import torch
from harness import Trial
from torch import Tensor, nn
from torch.func import grad, jvp

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.eigenpairs import top_eigenpairs
from polca_lib.method.vectors import orthogonalise, without
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import RunSettings, TrainingSettings
from polca_lib.tasks.training import train

SEED = 0
STEPS = {"smoke": 40, "laptop": 300, "paper": 100}  # of training before the Hessian is looked at
EXAMPLES = {"smoke": 20, "laptop": 200, "paper": 50}
TOLERANCES = {"smoke": (0.01, 0.001), "laptop": (0.01, 0.001), "paper": (0.01,)}
MOST = 300  # products that a contender may take
BASIS = {"smoke": (3, 20), "laptop": (15, 200), "paper": (10, 250)}  # vectors of a whole basis, and examples
RESIDUAL = 0.01  # of each vector in a whole basis


class Point:
    """A model after some training, its checkpoints, and the examples whose mean loss it is about."""

    def __init__(self, size: str, device: str, examples: int, every: int):
        config = RunSettings.from_preset(size)
        spacing = {"steps": STEPS[size] // every * every, "checkpoint_every": every, "state_every": STEPS[size]}
        training = TrainingSettings.model_validate({**config.training.model_dump(), **spacing})
        samples = arithmetic.sample_pairs(SEED, 0, examples, training.steps * training.batch_size)
        stream = arithmetic.encode(samples.train).to(device).split(training.batch_size)
        self.model = build_model(config.model, SEED, device)
        self.token_loss = TokenLoss(self.model, arithmetic.answer_loss)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = CheckpointFolder(Path(folder), self.token_loss, device)
            train(self.model, arithmetic.answer_loss, lambda step: stream[step], training, checkpoints)
            self.thetas = [checkpoints.theta(step) for step in checkpoints.steps[1:]]
        self.known: list[Tensor] = []  # vectors that P projects off
        self.theta = self.token_loss.flatten(self.token_loss.parameters)
        self.batch = arithmetic.encode(samples.hessian).to(device)
        self.hessian = HessianOperator(self.token_loss, self.theta, self.batch)
        # As hessian-eigenthings draws it: it takes a seed, not a vector.
        generator = torch.Generator().manual_seed(SEED)
        self.start = torch.randn(len(self.theta), generator=generator).to(device)
        self._double = TokenLoss(copy.deepcopy(self.model).double(), arithmetic.answer_loss)

    def move_to(self, theta: Tensor, known: list[Tensor]) -> None:
        """Go to another checkpoint, with the vectors found so far."""
        self.theta, self.known = theta, known
        torch.nn.utils.vector_to_parameters(theta, self.model.parameters())
        self.hessian.move_to(theta)

    def projected(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """v -> P H P v of the vectors known."""
        return lambda v: without(product(without(v, self.known)), self.known) if self.known else product(v)

    def mean_loss(self, theta: Tensor) -> Tensor:
        return self.token_loss(theta, self.batch).mean()

    def double_loss(self, theta: Tensor) -> Tensor:
        """The same in float64."""
        return self._double(theta, self.batch).mean()

    def residual(self, vector: Tensor) -> float:
        """||A v - lambda v|| / |lambda| in float64, lambda = v' A v, A = P H P."""
        v = vector.detach().double().flatten()
        v = v / v.norm()
        product = self.projected(lambda v: rebuilt(self.double_loss, self.theta.double(), v))(v)
        value = v @ product
        return float((product - value * v).norm() / value.abs())


def rebuilt(mean_loss: Callable[[Tensor], Tensor], theta: Tensor, vector: Tensor) -> Tensor:
    """H v by two backward passes, the graph built anew."""
    at = theta.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(at), at, create_graph=True)
    return torch.autograd.grad(gradient, at, vector)[0]


class Losses(nn.Module):
    """A model whose outputs are losses, for libraries that want a model and a function of its outputs."""

    def __init__(self, point: Point):
        super().__init__()
        self.model = point.model

    def forward(self, batch: Tensor) -> Tensor:
        return arithmetic.answer_loss(self.model, batch).view(len(batch), -1)


class Mean(nn.Module):
    """The mean of those outputs."""

    reduction = "mean"

    def forward(self, losses: Tensor, _: Tensor) -> Tensor:
        return losses.mean()


def curvlinops_hessian(point: Point) -> object:
    from curvlinops import HessianLinearOperator

    model = Losses(point)
    data = [(point.batch, point.batch)]  # the second item stands for labels, which are in the batch already
    return HessianLinearOperator(model, Mean(), list(model.parameters()), data, check_deterministic=False)


def eigenthings_hessian(point: Point) -> object:
    from hessian_eigenthings import HessianOperator as Hessian

    return Hessian(point.model, [point.batch], lambda model, batch: arithmetic.answer_loss(model, batch).mean())


# Solvers: (point, setting of its own) -> (vector, products)


def by_ours(point: Point, iterations: int) -> tuple[Tensor, int]:
    # In the basis, too, memory is measured for the first checkpoint alone. As with CoLA, no residual stops it before.
    # In the basis it also goes on until a larger eigenvalue is ruled out, which no other contender does.
    point.hessian.move_to(point.theta)
    how = {"tolerance": 1e-12, "max_products": iterations, "seed": None}
    pairs = top_eigenpairs(point.projected(point.hessian), without(point.start, point.known), **how)
    return pairs.vectors[0], pairs.products


def by_cola(point: Point, iterations: int) -> tuple[Tensor, int]:
    hessian = cola.ops.Hessian(point.mean_loss, point.theta)
    # No residual is small enough to stop before that many iterations; one product more measures it.
    settings = {"tolerance": 1e-12, "max_products": iterations, "solver": "cola", "seed": None}
    pairs = top_eigenpairs(point.projected(lambda v: hessian @ v), without(point.start, point.known), **settings)
    return pairs.vectors[0], pairs.products


def by_eigenthings(point: Point, iterations: int) -> tuple[Tensor, int]:
    from hessian_eigenthings import lanczos

    hessian = eigenthings_hessian(point)
    hessian.matvec = point.projected(hessian.matvec)
    found = lanczos(hessian, k=1, max_iter=iterations, which="LA", seed=SEED)
    return found.eigenvectors[0], found.iterations


def by_curvlinops(point: Point, tolerance: float) -> tuple[Tensor, int]:
    hessian = curvlinops_hessian(point)
    product = point.projected(lambda v: hessian @ v)
    products = 0

    def multiply(vector: object) -> object:
        nonlocal products
        products += 1
        return product(torch.as_tensor(vector, dtype=point.theta.dtype, device=point.theta.device)).cpu().numpy()

    operator = scipy.sparse.linalg.LinearOperator(hessian.shape, matvec=multiply, dtype="float32")
    start = without(point.start, point.known).cpu().numpy()
    _, vectors = scipy.sparse.linalg.eigsh(operator, k=1, which="LA", v0=start, tol=tolerance, maxiter=MOST)
    return torch.from_numpy(vectors[:, 0]).to(point.theta), products


def fewest(point: Point, solve: Callable, settings: Iterable[float], tolerance: float) -> float:
    """The first of ``settings``, which cost more and more, whose result has the residual asked for."""
    for setting in settings:
        if point.residual(solve(point, setting)[0]) <= tolerance:
            return setting
    raise ValueError(f"no setting of its own brings the residual to {tolerance}")


def upwards(point: Point, solve: Callable, first: int, tolerance: float) -> Iterable[int]:
    """Numbers of iterations, from ``first`` or, where fewer do, from less."""
    while first > 1 and point.residual(solve(point, first - 1)[0]) <= tolerance:
        first -= 1
    return range(first, MOST)


def solvers(point: Point, tolerance: float) -> dict[str, Callable[[], Trial]]:
    """What sets the contenders up, each with a setting of its own searched for."""
    # The search starts just below what the residual takes in the basis.
    point.hessian.move_to(point.theta)
    first = top_eigenpairs(point.hessian, point.start, tolerance=tolerance, max_products=MOST, seed=None).products - 1
    looser = [tolerance * factor for factor in (100, 30, 10, 3, 1, 0.3, 0.1, 0.01)]

    def trial(solve: Callable, settings: Callable[[], Iterable[float]]) -> Trial:
        setting = fewest(point, solve, settings(), tolerance)
        return Trial(lambda: solve(point, setting), keys={"own_setting": setting})

    return {
        "CoLA": lambda: trial(by_cola, lambda: upwards(point, by_cola, first, tolerance)),
        "hessian-eigenthings": lambda: trial(by_eigenthings, lambda: upwards(point, by_eigenthings, first, tolerance)),
        "curvlinops and eigsh": lambda: trial(by_curvlinops, lambda: looser),
        "ours": lambda: trial(by_ours, lambda: upwards(point, by_ours, first, tolerance)),
    }


def multipliers(point: Point, v: Tensor) -> dict[str, Callable[[], Trial]]:
    """What sets up one product with ``v``, for each way to have one."""

    def retained() -> Trial:
        return Trial(lambda: point.hessian(v))

    def curvlinops() -> Trial:
        hessian = curvlinops_hessian(point)
        return Trial(lambda: hessian @ v)

    def eigenthings() -> Trial:
        hessian = eigenthings_hessian(point)
        return Trial(lambda: hessian.matvec(v))

    def cola_hessian() -> Trial:
        hessian = cola.ops.Hessian(point.mean_loss, point.theta)
        return Trial(lambda: (hessian @ v[:, None])[:, 0])

    def forward_over_reverse() -> Trial:
        return Trial(torch.no_grad()(lambda: jvp(grad(point.mean_loss), (point.theta,), (v,))[1]))

    return {
        "CoLA": cola_hessian,
        "hessian-eigenthings": eigenthings,
        "curvlinops": curvlinops,
        "jvp of grad": forward_over_reverse,
        "double backward, rebuilt": lambda: Trial(lambda: rebuilt(point.mean_loss, point.theta, v)),
        "ours": retained,
    }


def fewest_products(point: Point) -> tuple[list[int], list[int]]:
    """For each vector of a basis: products until the residual is met, and until a larger one is ruled out."""
    met, certain, known = [], [], []
    for theta in point.thetas:
        point.move_to(theta, known)
        done: list[Tensor] = []

        def record(v: Tensor, done: list[Tensor] = done) -> Tensor:
            done.append(point.projected(point.hessian)(v))
            return done[-1].clone()

        start = without(point.start, known)
        pairs = top_eigenpairs(record, start, tolerance=RESIDUAL, max_products=MOST, seed=None)
        certain.append(pairs.products)
        # Fewer iterations from the same start make the same products.
        for most in range(1, len(done) + 1):
            again = iter(done)
            how = {"tolerance": 1e-12, "max_products": most, "seed": None}
            fewer = top_eigenpairs(lambda _, again=again: next(again).clone(), start, **how)
            if fewer.residuals.max() <= RESIDUAL:
                break
        met.append(most)
        known = [*known, orthogonalise(pairs.vectors[0], known)]
    return met, certain


def whole_basis(size: str, device: str) -> list[harness.Record]:
    """Every contender finds a basis by Algorithm 1, once: products, seconds, and residuals of some vectors."""
    vectors, examples = BASIS[size]
    point = Point(size, device, examples, STEPS[size] // vectors)
    met, certain = fewest_products(point)
    # ARPACK begins with a subspace of twenty, which brings the residual far below any tolerance as loose as this.
    contenders = {
        "CoLA": (by_cola, met),
        "hessian-eigenthings": (by_eigenthings, met),
        "curvlinops and eigsh": (by_curvlinops, [30 * RESIDUAL] * len(met)),
        "ours": (by_ours, met),
        "ours, a larger one ruled out": (by_ours, certain),
    }
    records, setting = [], f"{size}, {len(met)} vectors, {examples} examples"
    print(f"basis: {setting}", file=sys.stderr)
    for name, (solve, own) in contenders.items():
        known, seconds, products, residuals = [], 0.0, 0, []
        for row, (theta, most) in enumerate(zip(point.thetas, own, strict=True)):
            point.move_to(theta, known)
            found: list[tuple[Tensor, int]] = []
            step = partial(solve, point, most)
            seconds += harness.seconds(lambda step=step, found=found: found.append(step()), device)
            products += found[0][1]
            if row % max(1, len(own) // 5) == 0:
                residuals.append(point.residual(found[0][0]))
            known = [*known, orthogonalise(found[0][0].detach().flatten(), known)]
        records.append(
            {
                "question": "basis",
                "setting": setting,
                "contender": name,
                **dict.fromkeys(("median_s", "low_s", "high_s"), seconds),
                "repeats": 1,
                "unit": "s",
                "size": size,
                "products": products,
                "residual": max(residuals),
                **harness.provenance(device),
            }
        )
        print(f"  {name}: {seconds:.3g} s, {products} products, residual {max(residuals):.2g}", file=sys.stderr)
    ours = next(record["median_s"] for record in records if record["contender"] == "ours")
    return [{**record, "ratio_to_ours": record["median_s"] / ours} for record in records]


def measure(size: str, repeats: int, device: str) -> Iterator[list[harness.Record]]:
    """Records of the product, of the eigenpair for each residual, and of a whole basis."""
    point = Point(size, device, EXAMPLES[size], STEPS[size])
    keys = {"size": size, "steps_trained": STEPS[size], "parameters": len(point.theta)}
    common = {"ours": "ours", "repeats": repeats, "device": device, **keys}
    setting = f"{size}, {EXAMPLES[size]} examples"
    unit = point.start / point.start.norm()
    expected = rebuilt(point.double_loss, point.theta.double(), unit.double())

    def error(product: Tensor) -> harness.Record:
        return {"max_error": float((product - expected).abs().max() / expected.square().mean().sqrt())}

    def outcome(result: tuple[Tensor, int]) -> harness.Record:
        return {"residual": point.residual(result[0]), "products": result[1]}

    products = multipliers(point, unit)
    yield harness.compare("hessian product", setting, products, examine=error, unit="s a product", **common)
    for tolerance in TOLERANCES[size]:
        contenders = solvers(point, tolerance)
        name = f"{setting}, residual {tolerance:.1%}"
        yield harness.compare("eigenvector", name, contenders, examine=outcome, unit="s", tolerance=tolerance, **common)
    yield whole_basis(size, device)


def main() -> None:
    """Command line."""
    arguments = harness.arguments(__doc__).parse_args()
    for size in arguments.sizes:
        for records in measure(size, arguments.repeats, arguments.device):
            harness.write(arguments.out, records)


if __name__ == "__main__":
    main()
