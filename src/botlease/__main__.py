"""``python -m botlease``."""

from botlease.cli import main

main(prog_name="botlease")
