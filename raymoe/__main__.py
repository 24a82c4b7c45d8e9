"""`python -m raymoe`."""

from raymoe.cli import main

main()
