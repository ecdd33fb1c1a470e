"""The error that a user can fix, and the suggestions it makes."""


class UserError(Exception):
    """Something the user can mend; the message says how. The command line prints it without a traceback."""
