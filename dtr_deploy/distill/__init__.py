"""Stage 1: twins of attention layers, trained side by side from one teacher pass. `stage.distill` is the way in."""
