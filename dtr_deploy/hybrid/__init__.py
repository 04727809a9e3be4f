"""The hybrid checkpoint: configuration, layout, the mixer module and the model. Import the submodules you need."""
