"""The one exception that is meant for users."""


class UserError(Exception):
    """Something the user can mend: a file, an argument, a combination of options.

    The message is complete: it names the file or argument, what was expected and what came.
    The command line prints it without a traceback and exits with status 2.
    """
