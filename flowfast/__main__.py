"""`python -m flowfast`: the command line."""

import sys

from flowfast.cli import main

sys.exit(main())
