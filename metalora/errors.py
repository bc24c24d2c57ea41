"""The two exceptions that the package raises on purpose."""


class MetaLoraError(Exception):
    """What was asked cannot be done as asked. ``str(error)`` is one plain sentence for the user that says what to do."""


class Cancelled(Exception):
    """Raise it in an ``on_step`` callback to stop a training; nothing half done is kept."""
