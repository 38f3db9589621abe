"""Where a site lives in each architecture family. What is not known is refused by name."""

from steering.sites.facts import model_facts
from steering.sites.families import FAMILIES, Family
from steering.sites.fingerprints import fingerprint
from steering.sites.routers import attach_router, router_rule
from steering.sites.taps import Tap, attach, offered_sites, tap

__all__ = ["FAMILIES", "Family", "Tap", "attach", "attach_router", "fingerprint", "model_facts", "offered_sites",
           "router_rule", "tap"]
