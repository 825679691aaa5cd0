"""The controller's side of the module apt_set: an installation may take long, and most are in place already."""

from ..plugin_utils.seen import Seen
from . import watched


class ActionModule(Seen, watched.ActionModule):
    """Shows how far an installation is."""

    places = (
        "/etc/apt",
        "/var/lib/apt/lists",
        "/var/lib/dpkg/status",
        "/var/lib/dpkg/updates",
        "/var/lib/dots-ocr/installed/{}.json",
    )
    returns = ("installed", "kept")
