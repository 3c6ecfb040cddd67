"""Tables, contexts, the explorer and the HTML report of a run."""
