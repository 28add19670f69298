"""Metrics, the recorder of tokens, figures, the diagnosis and the report of a run."""
