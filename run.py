"""Train: python run.py [key=value ...]. Show all settings: python run.py --help."""

import sys

from relora.common import signals

if __name__ == "__main__":
    with signals.handled_signals():
        from relora.cli.main import run

        sys.exit(run(sys.argv[1:]))
