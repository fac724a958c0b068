"""python -m relora VERB: the same as relora VERB."""

import sys

from relora.cli import main

sys.exit(main())
