"""The `flashcomm` command; `command` puts it together, and every subcommand has a file of its own.

Each checks its input before it starts a process.
"""

from flashcomm.cli.command import app, main

__all__ = ["app", "main"]
