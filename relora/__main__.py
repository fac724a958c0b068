"""`python -m relora VERB` is the same as `relora VERB`."""

import sys

from relora.common import signals


def main() -> int:
    """Run `relora VERB` and return the exit code."""
    with signals.handled_signals():
        from relora.cli import main as cli

        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
