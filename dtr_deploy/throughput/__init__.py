"""How fast a layout is on the engine that will serve it: measured, and predicted from counts of layers per form."""
