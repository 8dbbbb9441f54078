"""Many users at inference: enrol them, keep them on disk, serve batches that mix them."""

from serving.personaliser import Personaliser
from serving.store import DamagedRecordError, ForeignStoreError, StoreBusyError, StoreFullError, UnknownUserError, UserStore

__all__ = [
    "DamagedRecordError",
    "ForeignStoreError",
    "Personaliser",
    "StoreBusyError",
    "StoreFullError",
    "UnknownUserError",
    "UserStore",
]
