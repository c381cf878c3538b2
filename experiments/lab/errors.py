"""The errors that a user can put right; the command line shows them without a traceback."""


class UserError(Exception):
    """Something outside the code is wrong, and the message says what to do about it."""


class NotEnoughRows(Exception):
    """The rows do not answer the question: too few of them, or none of the right kind.

    A claim whose ``measure`` raises this is reported as *not judged*, with the message as the reason.
    """
