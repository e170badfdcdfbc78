"""Long runs that try to break the promise: the model, and the simulation at scale."""
