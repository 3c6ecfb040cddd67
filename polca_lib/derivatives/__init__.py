"""Derivatives of ``token_loss``: <grad L(x), b>, b^T H(x) b and H v, exact and within a memory budget."""
