"""What rings mark of the guest's memory while it migrates."""

from __future__ import annotations

from bridge.guest.ring_setup import written_areas
from bridge.guest.vhost_user.device_interface import RingSetup
from bridge.guest.virtio.dirty_log import DirtyBitmap, DirtyLog
from bridge.guest.virtio.memory import GuestMemory


class DirtyLogs:
    """The bitmap that the front-end shares, and whether it wants it filled now."""

    def __init__(self) -> None:
        self.bitmap: DirtyBitmap | None = None
        self.is_enabled = False

    def of(self, memory: GuestMemory, setup: RingSetup, *, packed: bool) -> DirtyLog | None:
        """The log of one ring; None: it marks nothing."""
        if self.bitmap is None or not self.is_enabled:
            return None
        return DirtyLog(self.bitmap, memory, written_areas(memory, setup, packed=packed))
