"""`python -m attnplan`."""

from attnplan.cli.app import main

main()
