"""Stage 2: which layers to replace. `run.search_layout` is the way in; importing this package imports nothing heavy."""
