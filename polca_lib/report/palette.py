"""Colours of clusters: the palette of Okabe and Ito, which colour-blind readers can distinguish."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E", "#000000")
# The same colours, lighter, for lines on a dark page.
ON_DARK = ("#4BA3E3", "#F58A4B", "#2CC79B", "#E9A6CB", "#F3C04F", "#A5DBFF", "#A3A9B1", "#FFFFFF")


def cluster_colour(number: int) -> str:
    """Colour of cluster ``number`` (from 1), the same in every figure."""
    return OKABE_ITO[(number - 1) % len(OKABE_ITO)]
