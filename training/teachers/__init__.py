"""Teachers for distillation: a frozen model, a cache of its distributions, the model itself."""
