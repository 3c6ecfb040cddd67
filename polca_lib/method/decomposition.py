"""POLCA (Eq. 4-10): the loss change between checkpoints per token and direction, and what it is compared with.

Everything here is arithmetic on the dataset that :func:`polca_lib.analysis.workers.project_runs` returns.
Losses are in nats; along ``step``, entry t of an interval quantity belongs to the interval that starts there.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.settings import Order

ORDERS: tuple[Order, ...] = get_args(Order)
VANISHING = 1e-6


def polca(projections: xr.Dataset, order: Order = "second") -> xr.DataArray:
    """POLCA(x, b, t): loss change of token x by the movement along b in the interval that starts at t.

    With g_t = <grad L(x; theta_t), b> and s_t = <theta_{t+1} - theta_t, b>:

    - ``first`` (Eq. 4): g_t s_t.
    - ``second`` (Eq. 8-9): g_t s_t + lambda_t(X, b)/2 s_t^2 r. Here lambda_t(X, b) = b^T H_t(X) b is the curvature of
      the mean loss over all tokens X (Eq. 5), and r = (g_{t+1}(x) - g_t(x)) / (g_{t+1}(X) - g_t(X)) is the token's
      share of it (Eq. 6-7; Eq. 6 prints losses where Appendix A has gradients). Where the denominator vanishes (below
      1e-6 of the root mean square of its numerators) r is undefined. The term is then left out, and
      :func:`second_order_health` counts such cases.
    - ``exact``: g_t s_t + lambda_t(x, b)/2 s_t^2 with the token's own lambda_t(x, b) = b^T H_t(x) b.
    - ``trapezoid``: (g_t + g_{t+1})/2 s_t. It equals ``second`` where Appendix A's approximation
      lambda_t s_t = g_{t+1} - g_t holds. It needs no curvature and no division.

    Args:
        projections: with ``gradient`` and ``movement``, and ``curvature`` for ``second`` and ``exact``.
        order: one of ``ORDERS``.

    Returns:
        (step, token, vector), without the last step.

    Raises:
        ValueError: an unknown order, or one that needs a curvature that was not computed, or not for all tokens.
    """
    if order not in ORDERS:
        raise ValueError(f"order = {order!r} is unknown; allowed: {', '.join(ORDERS)}")
    if order in ("second", "exact") and "curvature" not in projections:
        raise ValueError(
            f"order = {order!r} needs the curvature along each vector, which this run did not compute; "
            "allowed here: first, trapezoid. Run it with projection.curvature = True"
        )
    if order == "exact" and "token" not in projections["curvature"].dims:
        raise ValueError(
            "order = 'exact' needs the curvature of every token, but this run measured it on a sample; allowed here: "
            "first, second, trapezoid. Run it with projection.curvature_examples = None"
        )
    gradient, movement = projections["gradient"].compute(), _intervals(projections["movement"])  # read once
    first = _intervals(gradient) * movement
    if order == "first":
        return _finish(first, order)
    rise = _difference(gradient)
    if order == "trapezoid":
        return _finish(first + rise * movement / 2, order)
    if order == "exact":
        return _finish(first + _intervals(projections["curvature"]) * movement**2 / 2, order)
    curvature = _intervals(mean_curvature(projections))
    mean_rise = rise.mean("token")
    ratio = rise / mean_rise.where(abs(mean_rise) > VANISHING * _spread(rise))
    return _finish(first + (curvature * movement**2 / 2 * ratio).fillna(0.0), order)


def available_orders(projections: xr.Dataset) -> list[Order]:
    """Orders that the curvature at hand allows."""
    orders: list[Order] = ["first", "trapezoid"]
    if "curvature" in projections:
        orders += ["second", "exact"] if "token" in projections["curvature"].dims else ["second"]
    return orders


def mean_curvature(projections: xr.Dataset) -> xr.DataArray:
    """lambda_t(X, b) = b^T H_t(X) b, (step, vector): mean over all tokens, or over the sample it was measured on."""
    curvature = projections["curvature"]
    return curvature.mean("token" if "token" in curvature.dims else "sample")


def second_order_health(projections: xr.Dataset) -> xr.Dataset:
    """How well the approximation behind ``second`` holds, per interval and vector.

    Returns:
        ``amplification`` (step, vector): lambda_t(X, b) s_t / (g_{t+1}(X) - g_t(X)), which Appendix A takes to be 1,
        and by which the second-order term exceeds the trapezoid's; ``undefined`` (step, vector): where the
        denominator vanishes, see :func:`polca`; ``noise`` (step, vector): where it is smaller than the standard error
        of a mean over so many tokens, so that its sign is chance.
    """
    rise = _difference(projections["gradient"])
    mean_rise, spread = rise.mean("token"), _spread(rise)
    undefined = abs(mean_rise) <= VANISHING * spread
    predicted = _intervals(mean_curvature(projections) * projections["movement"])
    return xr.Dataset(
        {
            "amplification": predicted / mean_rise.where(~undefined),
            "undefined": undefined,
            "noise": abs(mean_rise) < spread / np.sqrt(rise.sizes["token"]),
        }
    )


def accumulate(changes: xr.DataArray, steps: xr.DataArray) -> xr.DataArray:
    """Projected loss L_b(x, t) (Eq. 10): the sum of all changes before step t; zero at the first step.

    Args:
        changes: (step, ...) per interval.
        steps: coordinate of all checkpoints, one longer than ``changes``.
    """
    total = changes.cumsum("step").assign_coords(step=steps[1:])
    start = xr.zeros_like(changes.isel(step=[0])).assign_coords(step=steps[:1])
    return xr.concat([start, total], dim="step").assign_attrs(changes.attrs)


def projected_loss(projections: xr.Dataset, order: Order = "second") -> xr.DataArray:
    """L_b(x, t) of Eq. 10, in nats: (step, token, vector). See :func:`polca` for ``order``.

    The coordinate ``largest_loss`` (token) is max_t abs(L(x; theta_t)), on whose rounding depends what is movement, see
    :func:`polca_lib.method.clustering.moves`.
    """
    curves = accumulate(polca(projections, order), projections["step"]).rename("projected_loss")
    if "loss" not in projections:
        return curves
    return curves.assign_coords(largest_loss=("token", abs(projections["loss"]).max("step").values))


def coarsen(projections: xr.Dataset, factor: int) -> xr.Dataset:
    """The projections that a run with every ``factor``-th checkpoint alone would have had.

    ``distance`` and ``inside_loss`` can't be computed from them, and are left out for factors over 1.

    Raises:
        ValueError: the number of intervals is not a multiple of ``factor``.
    """
    intervals = projections.sizes["step"] - 1
    if factor < 1 or intervals % factor:
        allowed = [n for n in range(1, intervals + 1) if intervals % n == 0]
        raise ValueError(
            f"factor = {factor} does not divide the {intervals} intervals between checkpoints; allowed: "
            f"{', '.join(map(str, allowed))}"
        )
    if factor == 1:
        return projections
    thinned = projections.drop_vars(["distance", "inside_loss", "movement"], errors="ignore").isel(
        step=slice(None, None, factor)
    )
    summed = projections["movement"][:-1].values.reshape(intervals // factor, factor, -1).sum(axis=1)
    movement = np.concatenate([summed, np.full((1, summed.shape[1]), np.nan, summed.dtype)])
    return thinned.assign(movement=(("step", "vector"), movement))


def loss_change(projections: xr.Dataset) -> xr.DataArray:
    """Change in exact loss from each checkpoint to the next, (step, token): a baseline of v3's Table 3."""
    return _difference(projections["loss"]).rename("loss_change")


def fisher(projections: xr.Dataset) -> xr.DataArray:
    """Empirical Fisher information along b, <b, grad L(x; theta_t)>^2 (Appendix D), (step, token, vector)."""
    return (projections["gradient"] ** 2).rename("fisher")


def completeness(projections: xr.Dataset, order: Order) -> xr.Dataset:
    """How much of the true loss change the sum over vectors accounts for.

    Returns:
        ``claimed`` (step, token): sum over vectors of the projected loss; ``true``: L(x; t) - L(x; 0); ``inside``: what
        the movement inside the span of the basis delivers, the sum over intervals of
        L(x; theta_t + B^T B Delta_t) - L(x; theta_t). Attributes, all at the end of training: ``share`` and
        ``share_inside``: means of claimed and of inside over that of true; ``correlation`` and ``correlation_inside``:
        of claimed with true and with inside over tokens; ``largest`` and ``largest_true``: largest magnitudes for a
        token, in nats. What says inside is left out for projections without ``inside_loss``, see :func:`coarsen`.
    """
    claimed = projected_loss(projections, order).sum("vector")
    parts = {"claimed": claimed, "true": projections["loss"] - projections["loss"].isel(step=0, drop=True)}
    if "inside_loss" in projections:
        delivered = _intervals(projections["inside_loss"] - projections["loss"])
        parts["inside"] = accumulate(delivered, projections["step"])
    end = {name: values.isel(step=-1) for name, values in parts.items()}

    def correlation(other: str) -> float:
        return float(np.corrcoef(end["claimed"].values, end[other].values)[0, 1])

    attrs = {"share": float(end["claimed"].mean() / end["true"].mean()), "correlation": correlation("true")}
    if "inside" in end:
        attrs |= {"share_inside": float(end["inside"].mean() / end["true"].mean())}
        attrs |= {"correlation_inside": correlation("inside")}
    attrs |= {"largest": float(abs(end["claimed"]).max()), "largest_true": float(abs(end["true"]).max())}
    return xr.Dataset(parts, attrs=attrs)


def movement_share(projections: xr.Dataset) -> xr.DataArray:
    """``abs(B Delta_t)^2 / abs(Delta_t)^2`` per interval, the part of the movement that lies in the basis, (step,)."""
    share = (projections["movement"] ** 2).sum("vector") / projections["distance"] ** 2
    return _intervals(share).rename("movement_share")


def reversals(projections: xr.Dataset) -> xr.DataArray:
    """Share of intervals in which the weights move along b the other way than in the one before, (vector,).

    A walk without memory reverses half of the time; steady movement never does, oscillation always.
    """
    movement = _intervals(projections["movement"])
    turned = movement.values[1:] * movement.values[:-1] < 0
    return movement.isel(step=0, drop=True).copy(data=turned.mean(axis=0)).rename("reversals")


def compare_trajectories(left: xr.DataArray, right: xr.DataArray) -> pd.Series:
    """Mean cosine similarity and L2 distance of two sets of trajectories over tokens and vectors (Table 5)."""
    dot = (left * right).sum("step")
    lengths = np.sqrt((left**2).sum("step") * (right**2).sum("step"))
    return pd.Series(
        {
            "cosine": float((dot / lengths.where(lengths > 0)).mean()),
            "l2": float(np.sqrt(((left - right) ** 2).sum("step")).mean()),
        }
    )


def _intervals(values: xr.DataArray) -> xr.DataArray:
    """Values at the start of each interval: all steps but the last."""
    return values.isel(step=slice(None, -1))


def _spread(values: xr.DataArray) -> xr.DataArray:
    """Root mean square over tokens."""
    return np.sqrt((values**2).mean("token"))


def _difference(values: xr.DataArray) -> xr.DataArray:
    """Next minus this, labelled by the step at which the interval starts."""
    return values.diff("step", label="lower")


def _finish(values: xr.DataArray, order: Order) -> xr.DataArray:
    return values.transpose("step", "token", "vector").rename("polca").assign_attrs(order=order, units="nats")
