"""What bad input gets: one sentence with the name, the value and the limit; the command line exits with status 2."""


class InputError(ValueError):
    """The input, not the program, is at fault. The message is one sentence for the user's eyes."""


class NonFiniteError(InputError):
    """A loss or gradient became NaN or infinite, at `step` of an unroll where that is known."""

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step
