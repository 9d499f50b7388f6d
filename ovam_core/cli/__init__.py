"""The command `ovam`, a file a command; `python -m ovam_core` is the same program.

Only what a command needs is imported, and only when it runs: `ovam --help` answers without torch.
"""

from ovam_core.cli.app import main

__all__ = ["main"]
