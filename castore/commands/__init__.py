"""The commands of the `castore` program: one file a group, and what they share in :mod:`castore.commands.console`."""
