"""``python -m stoker.cli``: the same as ``stoker``, for who has the interpreter but not the script."""

import sys

from stoker.cli.main import entry

sys.exit(entry())
