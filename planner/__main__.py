"""`python -m attnplan`."""

from attnplan.cli import main

main()
