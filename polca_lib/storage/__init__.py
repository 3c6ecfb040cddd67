"""Storage of results, arrays in pieces, and checkpoints."""
