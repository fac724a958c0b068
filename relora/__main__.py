"""python -m relora VERB: the same as relora VERB."""

import sys

from relora import signals


def main() -> int:
    """Returns the exit code."""
    with signals.whole_process():
        from relora import cli

        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
