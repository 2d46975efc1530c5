"""Integrally pre-trained transformer pyramid networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itpn.models import create_model, load

__all__ = ["__version__", "create_model", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Only who asks for a model waits for torch."""
    if name in ("create_model", "load"):
        from itpn import models

        return getattr(models, name)
    raise AttributeError(f"module 'itpn' has no attribute {name!r}")
