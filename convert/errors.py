"""The one exception of this package, apart so that what needs no jax can raise it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or read, does not fit the model, or cannot be written. Names file, key, found and expected."""
