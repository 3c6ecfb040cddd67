"""Tasks: data, the loss of every target token, and the table that says what each token is."""
