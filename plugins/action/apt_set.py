"""The controller's side of the module apt_set: an installation may take long."""

from .watched import ActionModule  # noqa: F401
