"""`python -m jaxmodels.convert SRC DST`: the `jaxmodels convert` command."""

import sys

from jaxmodels.cli.main import main

sys.exit(main(["convert", *sys.argv[1:]]))
