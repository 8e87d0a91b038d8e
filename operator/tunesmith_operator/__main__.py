"""`python3 -m tunesmith_operator`: the operator's container runs this."""

import sys

from tunesmith_operator.shell.lifecycle import main

sys.exit(main())
