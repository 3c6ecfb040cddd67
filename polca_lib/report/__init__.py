"""What was found: tables, contexts, the explorer, the page."""
