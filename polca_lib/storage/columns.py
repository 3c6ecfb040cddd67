"""Columns of a token table as coordinates of a dataset, whatever they are called.

A column with an ordinary name, such as ``skill``, is the coordinate of that name. Any other is stored as ``column_0``,
``column_1``, ..., with its name in the attribute ``column``: Zarr can't store every name, and results use some.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import xarray as xr

_MAX_TEXT = 1000  # characters of a text; the longest text sets the size of the whole column
# Names of variables and coordinates of results.
_TAKEN = re.compile(
    r"_done|amplification|axis|birth_step|change|claimed|cluster|curvature|distance|eigenvalue|"
    r"fisher|gaussian|gradient|high|inside|inside_loss|largest_loss|loss|loss_change|low|medoid|median|"
    r"mixing|movement|movement_share|nearest|noise|parameter|polca|polyfit_coefficients|"
    r"product_error|products|projected_loss|quantile|rank|residual|reversals|sample|step|token|"
    r"tokens|true|undefined|variable|vector|vectors"
)


def _is_ordinary(name: str) -> bool:
    folded = name.casefold()  # some file systems do not tell upper from lower case
    return bool(re.fullmatch(r"(?!column_\d)[^\W\d_][\w.-]{0,99}", folded)) and not _TAKEN.fullmatch(folded)


def as_coordinates(table: pd.DataFrame) -> dict[str, xr.Variable]:
    """The columns of a table as coordinates along ``token``; of two with one name, the second gets the suffix ``.1``.

    Numbers and booleans are stored as they are, and all other values as text. Missing integers are NaN; a boolean
    column with missing values is text, and missing texts are empty.
    """
    coordinates: dict[str, xr.Variable] = {}
    names: list[str] = []
    for index in range(table.shape[1]):
        # Names that need not be text, nor unique.
        plain = name = str(table.columns[index])
        number = 0
        while name in names:
            number += 1
            name = f"{plain}.{number}"
        names.append(name)
        clashes = name.casefold() in {other.casefold() for other in names[:-1]}
        key, about = (name, {}) if _is_ordinary(name) and not clashes else (f"column_{index}", {"column": name})
        coordinates[key] = xr.Variable("token", _values(table.iloc[:, index]), about)
    return coordinates


def _values(column: pd.Series) -> np.ndarray:
    """The values of a column as Zarr stores them."""
    missing = column.isna().to_numpy()
    if pd.api.types.is_numeric_dtype(column):
        known = np.array(column[~missing].tolist()) if missing.any() else column.to_numpy()
        # Floats are exact for integers up to 2^53.
        if missing.any() and (known.dtype.kind == "f" or (known.dtype.kind in "iu" and (abs(known) <= 2**53).all())):
            values = np.full(len(column), np.nan)
            values[~missing] = known
            return values
        if not missing.any() and known.dtype.kind in "biuf" and known.dtype.itemsize <= 8:
            return known
    return np.array(["" if gap else str(value)[:_MAX_TEXT] for value, gap in zip(column, missing, strict=True)])


def separate_columns(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with columns of the token table under names that clash with nothing, also if it is an older one."""
    odd = [
        name
        for name, variable in dataset.variables.items()
        if variable.dims == ("token",) and name != "token" and "column" not in variable.attrs and not _is_ordinary(name)
    ]
    for name in odd:
        dataset[name].attrs["column"] = str(name)
    names = {name: f"column_{index}" for index, name in enumerate(odd)}
    return dataset.rename(names).set_coords(names.values())


def token_table(dataset: xr.Dataset | xr.DataArray) -> pd.DataFrame:
    """The token table of a dataset, with the names that its columns were given."""
    columns = {
        str(coordinate.attrs.get("column", name)): coordinate.values
        for name, coordinate in dataset.coords.items()
        if coordinate.dims == ("token",) and name != "token"
    }
    # As objects, for text of any kind.
    values = [column.astype(object) if column.dtype.kind == "U" else column for column in columns.values()]
    table = pd.DataFrame(dict(enumerate(values)), index=range(dataset.sizes["token"]))
    return table.set_axis(pd.Index(columns, dtype=object), axis=1)
