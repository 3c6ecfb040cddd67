"""Tasks: the data, the loss of each target token, and a table that describes the tokens."""
