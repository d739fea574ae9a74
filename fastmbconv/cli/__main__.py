"""`python -m fastmbconv.cli`: the command, where its script is not on the path."""

import sys

from fastmbconv.cli import main

sys.exit(main())
