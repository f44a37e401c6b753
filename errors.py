"""The errors a user may see. Each is one line: which file, what is wrong, what to do.

Everything that can go wrong because of a file, a flag or the machine is raised as one of these; the command
line prints the line and ends with `exit_status`. Any other exception is a defect of the package.
"""


def quoted(name: object) -> str:
    """A name from a file for an error message: one line, printable, of bounded length."""
    text = str(name)
    return ascii(text if len(text) <= 100 else text[:97] + "...")[1:-1]


class PocketlmError(Exception):
    """The work failed for a reason outside the program: one line for the user, exit status 1."""

    exit_status = 1


class UsageError(PocketlmError):
    """The request makes no sense: an unknown flag value, a text the tokenizer cannot take; exit status 2."""

    exit_status = 2


class FileError(PocketlmError):
    """Something is wrong with one file."""

    def __init__(self, path: object, problem: str, advice: str = ""):
        """`path` names the file, `problem` says what is wrong with it, `advice` what to do (one clause, may be empty)."""
        self.path, self.problem, self.advice = path, problem, advice
        super().__init__(f"{path}: {problem}" + (f"; {advice}" if advice else ""))
