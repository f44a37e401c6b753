"""`pocketlm` and `python -m pocketlm`. Until the command is imported, Ctrl-C ends the process at once, without a traceback."""

import signal
import sys


def main() -> int:
    """Run the command; returns its exit status."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:  # not where a shell has the process ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pocketlm import cli

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
