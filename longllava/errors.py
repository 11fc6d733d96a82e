"""One error type, few kinds. A message says what, what it got, what is allowed, and what to do.

`LongLLaVAError` is a ValueError: callers may catch either. `assert` is kept for our own invariants.
"""


class LongLLaVAError(ValueError):
    """Anything the caller can mend. The command line prints it in one sentence and exits with 1."""


class ConfigError(LongLLaVAError):
    """A setting or YAML key that cannot be used."""


class InputError(LongLLaVAError):
    """A picture, video or prompt that cannot be used."""


class CheckpointError(LongLLaVAError):
    """Weights, tokenizer or session files that are missing, torn or of another model."""


class DataError(LongLLaVAError):
    """A recipe, a source or a record of training data that cannot be used."""


class TrainingError(LongLLaVAError):
    """Training cannot start, go on, or be resumed."""


class BackendError(LongLLaVAError):
    """No backend can run a call, or the one that was asked for cannot."""
