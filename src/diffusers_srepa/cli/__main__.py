"""`python -m diffusers_srepa.cli`, as launchers start the command."""

import sys

from diffusers_srepa.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
