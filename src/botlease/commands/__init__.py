"""The operator's commands: ask the store, print."""

from botlease.commands import change, here, see
from botlease.commands.here import check
from botlease.commands.shared import COMMANDS

__all__ = ["COMMANDS", "change", "check", "here", "see"]
