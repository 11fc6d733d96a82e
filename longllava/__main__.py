"""`python -m longllava` is the command line, as a launcher such as torchrun needs it."""

from longllava.cli import main

main()
