"""Volumes as RBD images of one Ceph pool (and namespace)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import threading
import uuid
from collections.abc import Callable
from typing import TypeVar

import rados
import rbd

from nbd_plugin import names
from nbd_plugin.deadline import call_within, in_background, wait_for_background
from nbd_plugin.errors import PluginError, one_line
from nbd_plugin.rbd_disk import RbdDisk, load_state
from nbd_plugin.rbd_lock import take_lock
from nbd_plugin.rbd_seen import HeaderVersion
from nbd_plugin.resizing import resizing
from nbd_plugin.settings import Settings
from nbd_plugin.store import COMMAND_WAIT_S, VolumeInfo, VolumeState

_T = TypeVar("_T")

_STOP_TIMEOUT_S = 5.0

_FEATURES = (
    "layering",
    "exclusive-lock",
    "object-map",
    "fast-diff",
    "deep-flatten",
)


class RbdStore:
    """The images of a pool; with `image` just that one."""

    name = "rbd"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timeout_s = settings.timeout_s
        self._only = settings.image
        self._cluster: rados.Rados | None = None
        self._pool: rados.Ioctx | None = None  # set by start
        self._process = uuid.uuid4()
        self._losses: dict[str, int] = {}
        self._lock = threading.Lock()

    # --- the connection to the cluster -------------------------------------------------------

    def start(self) -> None:
        """Connect and open the pool. Raises PluginError within the time limit."""
        settings = self._settings
        options = {"client_mount_timeout": str(max(1, round(self._timeout_s)))}
        try:
            cluster = rados.Rados(
                conffile=settings.conf or rados.Rados.DEFAULT_CONF_FILES,
                rados_id=settings.id or None,
                conf=options,
            )
        except Exception as error:
            raise PluginError(
                f"conf={settings.conf or 'default'}: {one_line(error)}", errno.EINVAL
            ) from None
        try:
            call_within(self._timeout_s, "connecting to the Ceph cluster", cluster.connect)
        except Exception as error:
            raise PluginError(
                f"the Ceph cluster cannot be reached: {one_line(error)}", errno.EIO
            ) from None
        self._cluster = cluster
        self._pool = self._bounded(f"opening pool {settings.pool}", self._open_pool)
        if self._only:
            self._open_or_create_only()

    def stop(self) -> None:
        """Disconnect, unless something still waits for the cluster.

        librados ends the process (an assertion) when it is shut down under a running call. The
        connection is then left to the end of the process, and kept from Python's own cleaning up.
        """
        cluster = self._cluster
        if cluster is None:
            return
        self._cluster = None
        if wait_for_background(_STOP_TIMEOUT_S):
            with contextlib.suppress(PluginError):
                call_within(_STOP_TIMEOUT_S, "disconnecting", cluster.shutdown)
                return
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(cluster))

    def check(self) -> None:
        """Try `start` in a child process, and raise the PluginError that it would raise.

        For the time before nbdkit's fork: librados' threads do not survive a fork, but a daemon
        that has forked can no longer say why it does not start.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._check_in_child(writer)
        os.close(writer)
        try:
            # More than one step has the time limit.
            if not select.select([reader], [], [], 2 * self._timeout_s + 2)[0]:
                os.kill(child, signal.SIGKILL)
                raise PluginError("the Ceph cluster does not answer", errno.EIO)
            text = os.read(reader, 4096).decode()
        finally:
            os.close(reader)
            os.waitpid(child, 0)
        if text != "ok":
            raise PluginError(text or "librados ended the process", errno.EIO)

    def _check_in_child(self, writer: int) -> None:
        text = "ok"
        try:
            self.start()
        except BaseException as error:
            text = one_line(error)
        finally:
            os.write(writer, text.encode())
            os._exit(0)  # and not through nbdkit's exit handlers

    # --- volumes -----------------------------------------------------------------------------

    def default_volume(self) -> str:
        """See `Store`: the image of the parameter `image`."""
        return self._only

    def list_volumes(self) -> list[VolumeInfo]:
        """See `Store`. Raises PluginError (ETIMEDOUT, and what `open` raises)."""
        if self._only:
            images = [self._only]
        else:
            images = sorted(self._bounded("listing images", lambda: rbd.RBD().list(self._pool)))
        found = []
        for name in filter(names.is_volume_name, images):
            try:
                disk = self.open(name, read_only=True, timeout_s=0)
            except PluginError as error:
                if error.errno == errno.ENOENT:
                    continue  # removed meanwhile
                raise
            found.append(VolumeInfo(name, disk.size_bytes, None, disk.load_state().read_only))
            disk.close()
        return found

    def open(self, name: str, *, read_only: bool, timeout_s: float) -> RbdDisk:
        """See `Store`. For writing, the image's exclusive lock is taken. Raises PluginError
        (ENOENT, EBUSY, EROFS, ETIMEDOUT; without the exclusive-lock feature)."""
        volume, _, snapshot = self._check(name).partition("@")
        image = self._open_image(volume, snapshot, read_only=read_only or bool(snapshot))
        try:
            if snapshot:
                read_only = True
            elif not read_only and load_state(image).read_only:
                image.close()
                return self.open(name, read_only=True, timeout_s=timeout_s)
            header = HeaderVersion(self._open_pool, volume)
            return self._disk(image, name, header, read_only=read_only, timeout_s=timeout_s)
        except BaseException:
            # In the background: it hangs if what failed was the cluster.
            in_background(f"closing volume {name}", image.close)
            raise

    def _disk(
        self,
        image: rbd.Image,
        name: str,
        header: HeaderVersion,
        *,
        read_only: bool,
        timeout_s: float,
    ) -> RbdDisk:
        """The disk in `image`; the exclusive lock is taken unless it is `read_only`."""
        untouched = False

        def is_as_remembered() -> bool:
            try:
                return header.is_as_remembered()
            except rados.Error:
                return False

        def look(is_as_left: bool) -> None:
            nonlocal untouched
            untouched = is_as_left or is_as_remembered()

        def look_now() -> bool:
            return self._bounded(f"looking at volume {name}", is_as_remembered)

        if not read_only:
            self._refuse_demoted(image, name)
            self._take_lock(image, name, timeout_s, look)
        may_remember = not read_only and self._may_remember(header, name)
        instance = uuid.uuid5(self._process, f"{name} {self._losses.get(name, 0)}")
        return RbdDisk(
            image,
            read_only=read_only,
            instance=str(instance),
            on_loss=lambda: self._note_loss(name),
            is_untouched=look_now if read_only else lambda: untouched,
            on_closed=(lambda: self._remember(header, name)) if may_remember else None,
        )

    def create(self, name: str, size_bytes: int, *, read_only: bool = False) -> None:
        """See `Store`. Raises PluginError (EEXIST, ETIMEDOUT)."""
        self._check(name)
        features = rbd.RBD().features_from_string(",".join(_FEATURES))

        def make() -> None:
            rbd.RBD().create(self._pool, name, size_bytes, features=features)

        try:
            self._bounded(f"creating volume {name}", make)
        except rbd.ImageExists:
            raise PluginError(f"volume {name} exists already", errno.EEXIST) from None
        if read_only:
            disk = self.open(name, read_only=False, timeout_s=self._timeout_s)
            disk.update_state(lambda _: VolumeState(generation=1, written=1, read_only=True))
            disk.close()

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> None:
        """See `Store`. Raises PluginError (EROFS; EBUSY; smaller without `shrink`)."""
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        with resizing(disk, name, size_bytes, shrink=shrink) as opened:
            opened.image.resize(size_bytes)

    def remove(self, name: str) -> None:
        """See `Store`. A snapshot by `name@snapshot`. Raises PluginError (EBUSY, ENOENT; with
        snapshots left)."""
        volume, _, snapshot = self._check(name).partition("@")
        if not snapshot:
            self.open(volume, read_only=False, timeout_s=COMMAND_WAIT_S).close()
        try:
            if snapshot:
                image = self._open_image(volume, "", read_only=False)
                try:
                    image.remove_snap(snapshot)
                finally:
                    image.close()
            else:
                rbd.RBD().remove(self._pool, volume)
        except rbd.ImageHasSnapshots:
            raise PluginError(f"volume {name} has snapshots: remove them first") from None
        except rbd.ImageBusy:
            raise PluginError(f"volume {name} is open", errno.EBUSY) from None
        except rbd.ImageNotFound:
            raise PluginError(f"volume {name} does not exist", errno.ENOENT) from None

    def snapshot(self, name: str, snapshot: str) -> None:
        """See `Store`. Raises PluginError (EEXIST, EBUSY)."""
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        try:
            disk.image.create_snap(snapshot)
        except rbd.ImageExists:
            raise PluginError(f"volume {name}@{snapshot} exists already", errno.EEXIST) from None
        finally:
            disk.close()

    # --- helpers -----------------------------------------------------------------------------

    def _check(self, name: str) -> str:
        names.check_volume_name(name)
        if self._only and name.partition("@")[0] != self._only:
            raise PluginError(f"volume {name} does not exist", errno.ENOENT)
        return name

    def _open_or_create_only(self) -> None:
        """Find out at start that the one image is there; with create=on see to it."""
        try:
            self.open(self._only, read_only=True, timeout_s=0).close()
        except PluginError as error:
            size_bytes = self._settings.size_bytes
            creates = self._settings.create == "on" and size_bytes is not None
            if error.errno != errno.ENOENT or not creates:
                raise
            self.create(self._only, size_bytes or 0)

    def _open_pool(self) -> rados.Ioctx:
        assert self._cluster is not None
        try:
            pool = self._cluster.open_ioctx(self._settings.pool)
        except rados.ObjectNotFound:
            raise PluginError(f"pool {self._settings.pool} does not exist", errno.ENOENT) from None
        if self._settings.namespace:
            pool.set_namespace(self._settings.namespace)
        return pool

    def _open_image(self, volume: str, snapshot: str, *, read_only: bool) -> rbd.Image:
        def opened() -> rbd.Image:
            return rbd.Image(self._pool, volume, snapshot=snapshot or None, read_only=read_only)

        try:
            return call_within(
                self._timeout_s, f"opening volume {volume}", opened, too_late=rbd.Image.close
            )
        except rbd.ImageNotFound:
            shown = f"{volume}@{snapshot}" if snapshot else volume
            raise PluginError(
                f"volume {shown} does not exist in pool {self._settings.pool}", errno.ENOENT
            ) from None

    def _may_remember(self, header: HeaderVersion, name: str) -> bool:
        """False where this Ceph user may not: then other clients' writes go unseen."""
        try:
            self._bounded(f"opening volume {name}", header.forget)
        except rados.Error:
            return False
        return True

    def _remember(self, header: HeaderVersion, name: str) -> None:
        # If that fails, the next session takes the image for one that was changed.
        with contextlib.suppress(PluginError, rados.Error):
            self._bounded(f"closing volume {name}", header.remember)

    def _take_lock(
        self, image: rbd.Image, name: str, timeout_s: float, look: Callable[[bool], object]
    ) -> None:
        if not image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            raise PluginError(
                f"volume {name} lacks the exclusive-lock feature: "
                f"rbd feature enable {self._settings.pool}/{name} exclusive-lock"
            )
        take_lock(image, name, timeout_s, look)

    def _refuse_demoted(self, image: rbd.Image, name: str) -> None:
        """A mirrored image that is not the primary one cannot be locked; that would look busy."""
        try:
            mirrored = image.mirror_image_get_info()
        except rbd.Error:
            return  # no mirroring here
        if mirrored["state"] != rbd.RBD_MIRROR_IMAGE_DISABLED and not mirrored["primary"]:
            raise PluginError(
                f"volume {name} is demoted, the other cluster may be writing it: "
                f"rbd mirror image promote {self._settings.pool}/{name}, or open it read-only",
                errno.EROFS,
            )

    def _bounded(self, what: str, function: Callable[[], _T]) -> _T:
        return call_within(self._timeout_s, what, function)

    def _note_loss(self, name: str) -> None:
        with self._lock:
            self._losses[name] = self._losses.get(name, 0) + 1
