"""python run.py [key=value ...]: train. python run.py --help: what can be set."""

import sys

from relora.cli import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
