"""`python -m itpn` is `itpn`."""

import sys

from itpn.cli import main

sys.exit(main())
