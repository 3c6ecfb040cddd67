"""What only this book says: studies, tables, figures, claims and verdicts."""
