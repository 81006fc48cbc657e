"""`python -m fastdiff`: the same as the `fastdiff` command."""

import sys

from fastdiff.cli import main

sys.exit(main())
