"""The exceptions kelix_rt raises on purpose; everything else is a bug."""

from __future__ import annotations


class KelixError(Exception):
    """Base of every error kelix_rt raises on purpose."""


class ConfigError(KelixError, ValueError):
    """A config file or engine option is unknown, impossible or contradictory."""


class WeightError(KelixError, ValueError):
    """A checkpoint tensor is missing, misshapen or not finite."""


class InputError(KelixError, ValueError):
    """A request cannot be served as written; other requests are not affected."""


class CapacityError(KelixError, RuntimeError):
    """A request or a plan needs more memory than there is."""


class AsleepError(KelixError, RuntimeError):
    """The engine gave its memory back; `Engine.wake` takes it again."""


class BusyError(KelixError, RuntimeError):
    """Another thread is inside the engine; nothing was changed."""


class NativeError(KelixError, RuntimeError):
    """The native library is absent, or was built without what the call needs."""
