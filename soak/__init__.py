"""Long runs that try to break the promise: models, the simulation at scale, stores and real processes."""
