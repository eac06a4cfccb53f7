"""`python -m medmoco.report`."""

import sys

from medmoco.command import run_command
from medmoco.report import main

sys.exit(run_command(main))
