"""Volumes: file systems that outlive sandboxes.

``DATA_DIR/volumes/ID.ext4`` is one volume, raw and sparse. It is in the ledger (kind ``volume``, owner its id) before it is made,
and gets its row when it is complete: an import that is cut short leaves a ledger entry without a row, which the next start removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from stoker.api.models import CreateVolume, Principal, Quota, Volume, VolumeMount, VolumePage, VolumeUser
from stoker.engine.build import attached
from stoker.engine.claims import claim_in, in_use, unclaim_in, users_in
from stoker.engine.helper import helper
from stoker.engine.ledger import Kind, Ledger
from stoker.engine.pages import page_after
from stoker.engine.resize import fill, show
from stoker.engine.state import Mounted, VolumeRecord, new_id, require
from stoker.engine.trace import trace
from stoker.engine.volume_files import volume_path
from stoker.errors import Conflict, GuestError, InvalidRequest, NotFound
from stoker.storage import volume as files

if TYPE_CHECKING:
    from stoker.engine.core import Box, Core

__all__ = ["Volumes", "check_paths"]

MIB: Final = 1 << 20
PIECE: Final = 1 << 20
LEAVING: Final = 30.0
"""Seconds that a sandbox which is being destroyed may take to let go of its volumes."""
KERNEL_OWN: Final = ("/proc", "/sys", "/dev", "/run/stoker")
SEPARATE: Final = "/volume"
"""Where a helper machine mounts the volume it works on."""


def check_paths(volumes: Sequence[VolumeMount], app: bool) -> None:
    """Refuses mount points that hide one another or the kernel's own places."""
    taken = {"/app"} if app else set()
    for one in volumes:
        parts = one.path.rstrip("/").split("/")[1:]
        path = "/" + "/".join(parts)
        if not parts or any(part in ("", ".", "..") for part in parts):
            raise InvalidRequest(
                "bad_mount_path", f"{one.path!r} is no place for a volume", "an absolute path without '.' and '..'"
            )
        if any(path == place or path.startswith(f"{place}/") for place in KERNEL_OWN):
            raise InvalidRequest("bad_mount_path", f"{one.path!r} is the kernel's own", "another path, such as /data")
        if path in taken:
            raise InvalidRequest("bad_mount_path", f"{one.path!r} is taken twice", "another path for one of the two")
        taken.add(path)
    names = [one.name for one in volumes]
    if len(set(names)) != len(names):
        raise InvalidRequest("volume_twice", "a volume can be mounted once in a sandbox", "name it once")


class Volumes:
    """All volumes; the database has them too."""

    def __init__(self, core: Core, quota: Callable[[str], Quota | None]) -> None:
        self._core = core
        self._quota = quota
        self._all = core.volumes
        self._coming: set[tuple[str, str]] = set()
        """Names that are being made."""

    # -- finding ------------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Claims of jobs that a former daemon had are over; what the volumes may grow to is reserved."""
        await self._core.database.write(lambda db: db.execute("DELETE FROM claims WHERE user NOT IN (SELECT id FROM sandboxes)"))
        for record in list(self._all.values()):
            there = await asyncio.to_thread(files.size_of, self.path(record.id))
            if there > record.size:
                # A resize that was cut short: a guest may know the new size already.
                record = await self._sized(record, there)
            self._core.admission.hold_volume(record.id, owner=record.owner, disk=record.size)

    def path(self, identity: str) -> Path:
        return volume_path(self._core, identity)

    def _find(self, who: Principal, reference: str) -> VolumeRecord:
        """By id or name; what belongs to others does not exist; an administrator's own names come first."""
        mine = [v for v in self._all.values() if reference in (v.id, v.name) and (who.admin or v.owner == who.owner)]
        if not mine:
            raise NotFound("volume_unknown", f"there is no volume {reference}", "stoker volume ls")
        return min(mine, key=lambda v: (v.owner != who.owner, v.id != reference, v.created_at))

    def resolve(self, who: Principal, volumes: Sequence[VolumeMount]) -> list[Mounted]:
        """The volumes that a request names."""
        found = [(self._find(who, one.name), one) for one in volumes]
        mounted = [Mounted(id=v.id, name=v.name, path=one.path.rstrip("/"), read_only=one.read_only) for v, one in found]
        if len({one.id for one in mounted}) != len(mounted):
            raise InvalidRequest("volume_twice", "a volume can be mounted once in a sandbox", "name it once")
        return mounted

    async def left(self, volumes: Collection[str]) -> None:
        """Waits for sandboxes that are just going: whoever has ended one expects that its volumes are free."""

        def going(box: Box) -> bool:
            released = box.lease_until is not None and box.lease_until <= time.monotonic()
            return (box.record.doomed or released) and any(one.id in volumes for one in box.record.volumes)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVING):
                while (box := next(filter(going, self._core.boxes.values()), None)) is not None:
                    await box.changed.wait()

    # -- what the API offers ------------------------------------------------------------------------------------------

    async def create(self, who: Principal, request: CreateVolume) -> Volume:
        async with self._making(who, request.name, request.size) as record:
            pass
        return await self._value(record)

    async def get(self, who: Principal, volume: str) -> Volume:
        return await self._value(self._find(who, volume))

    async def list(self, who: Principal, *, limit: int, cursor: str | None) -> VolumePage:
        """Newest first."""
        own = [v for v in self._all.values() if who.admin or v.owner == who.owner]
        own.sort(key=lambda v: (v.created_at, v.id), reverse=True)
        page, following = page_after(own, limit, cursor, lambda v: (v.created_at, v.id))
        return VolumePage(items=[await self._value(v) for v in page], next=following)

    async def remove(self, who: Principal, volume: str) -> None:
        """``volume_in_use`` with the names of its users. Its file goes after its row."""
        record = self._find(who, volume)
        await self.left({record.id})

        def work(db: sqlite3.Connection) -> None:
            if users := users_in(db, record.id):
                raise in_use(record.name, users, "cannot be removed")
            db.execute("DELETE FROM volumes WHERE id = ?", (record.id,))

        await self._core.database.write(work, durable=True)
        self._all.pop(record.id, None)
        trace("volume.after_row_gone")
        await self._forget(record)

    async def resize(self, who: Principal, volume: str, size: int) -> Volume:
        """Larger only. The file system grows along in the guest that has it mounted, or when it is mounted next.

        One that is only read is refused, and one that a job is at: who reads it does not expect it to change.
        """
        record, size = self._find(who, volume), -(-size // MIB) * MIB
        await self.left({record.id})
        box = await self._writer(record)
        if box is None:
            async with self._held(record, "a resize", "cannot be resized"):
                changed = await self._grow(record.id, size)
        else:
            require(box.record, "resize")
            async with box.lock:
                require(box.record, "resize")
                number, mounted = self._number(box, record)
                changed = await self._grow(record.id, size)
                await show(box, number, size)
                await fill(box, record.id, mounted.path, size)
        return await self._value(changed)

    async def _writer(self, record: VolumeRecord) -> Box | None:
        """The sandbox that has it to itself, if one has."""
        users = await self._core.database.read(lambda db: users_in(db, record.id))
        return self._core.boxes.get(users[0].id) if len(users) == 1 and not users[0].read_only else None

    def _number(self, box: Box, record: VolumeRecord) -> tuple[int, Mounted]:
        """Which of a machine's disks it is, and where it is mounted there. The sandbox's lock is held."""
        disks = [disk.serial for disk in attached(self._core, box.record, self._core.places(box.id))]
        if box.gone or record.id not in disks:
            raise Conflict("volume_in_use", f"volume {record.name} has changed hands just now", "try again")
        return 1 + disks.index(record.id), next(one for one in box.record.volumes if one.id == record.id)

    async def _grow(self, identity: str, size: int) -> VolumeRecord:
        """Its file and its row. Nobody else is at it."""
        record = self._all.get(identity)
        if record is None:
            raise NotFound("volume_unknown", f"there is no volume {identity}", "stoker volume ls")
        if size < record.size:
            raise InvalidRequest(
                "volume_shrink", f"volume {record.name} has {record.size} bytes and cannot become smaller", "make another and copy"
            )
        self._core.admission.admit_volume(record.id, owner=record.owner, disk=size, quota=self._quota(record.owner))
        try:
            await asyncio.to_thread(files.grow_volume, self.path(record.id), size)
            trace("volume.after_grown")
            return await self._sized(record, size)
        except BaseException:
            self._core.admission.hold_volume(record.id, owner=record.owner, disk=record.size)
            raise

    async def _sized(self, record: VolumeRecord, size: int) -> VolumeRecord:
        """Writes down how large it is."""
        changed = replace(record, size=size)
        text = msgspec.json.encode(changed).decode()
        await self._core.database.write(
            lambda db: db.execute("UPDATE volumes SET record = ? WHERE id = ?", (text, record.id)), durable=True
        )
        self._all[record.id] = changed
        return changed

    async def import_tar(self, who: Principal, name: str, size: int, source: AsyncIterator[bytes]) -> Volume:
        """A new volume with the content of a tar. It is there whole or not at all.

        A machine of our own unpacks it, by its kernel, into nothing but this volume: whatever the archive holds.
        """
        from stoker.guest.files import Files

        async with self._making(who, name, size) as record:
            trace("volume.after_made")
            mounted = Mounted(id=record.id, name=name, path=SEPARATE)
            async with helper(self._core, who.owner, mounted, self.path(record.id)) as agent:
                await Files(agent, user="0:0").tar_in(SEPARATE, source, preserve=True)
                trace("volume.after_unpacked")
            if await asyncio.to_thread(files.is_dirty, self.path(record.id)):
                raise GuestError("import_failed", f"the machine that filled volume {name} did not unmount it", "try again")
        return await self._value(record)

    @asynccontextmanager
    async def export_tar(self, who: Principal, volume: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Its content as a tar with owners, modes, links, holes and extended attributes: read by a guest's kernel, not by ours."""
        from stoker.guest.files import Files

        record = self._find(who, volume)
        # One that was not unmounted is mounted for writing, so that its journal is replayed.
        dirty = await asyncio.to_thread(files.is_dirty, self.path(record.id))
        async with self._held(record, "an export", "cannot be exported", read_only=not dirty):
            mounted = Mounted(id=record.id, name=record.name, path=SEPARATE, read_only=not dirty)
            async with helper(self._core, who.owner, mounted, self.path(record.id)) as agent:
                async with Files(agent, user="0:0").tar_out(SEPARATE, exact=True) as pieces:
                    yield pieces

    @asynccontextmanager
    async def export_raw(self, who: Principal, volume: str) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Its size and its bytes as they are."""
        record = self._find(who, volume)
        async with self._held(record, "an export", "cannot be exported", read_only=True):
            with open(self.path(record.id), "rb") as file:

                async def pieces() -> AsyncIterator[bytes]:
                    while data := await asyncio.to_thread(file.read, PIECE):
                        yield data

                yield record.size, pieces()

    # -- making -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _making(self, who: Principal, name: str, size: int) -> AsyncIterator[VolumeRecord]:
        """A volume that gets its row at the end of the block; a block that fails leaves nothing."""
        size = -(-size // MIB) * MIB
        record = VolumeRecord(id=new_id("vol", 16), owner=who.owner, name=name, size=size, created_at=time.time())
        place = (record.owner, name)
        if place in self._coming or any((v.owner, v.name) == place for v in self._all.values()):
            raise Conflict("volume_exists", f"there is a volume {name} already", f"stoker volume rm {name}, or another name")
        self._core.admission.admit_volume(record.id, owner=who.owner, disk=size, quota=self._quota(who.owner))
        self._coming.add(place)
        path = str(self.path(record.id))
        try:
            await self._core.ledger.intend(record.id, Kind.VOLUME, path)
            trace("volume.after_intent")
            await files.make_volume(self.path(record.id), size)
            yield record
            await self._commit(record, path)
        except BaseException:
            await asyncio.shield(self._forget(record))
            raise
        finally:
            self._coming.discard(place)

    async def _commit(self, record: VolumeRecord, path: str) -> None:
        text = msgspec.json.encode(record).decode()

        def work(db: sqlite3.Connection) -> None:
            values = (record.id, record.owner, record.name, record.created_at, text)
            db.execute("INSERT INTO volumes (id, owner, name, created, record) VALUES (?, ?, ?, ?, ?)", values)
            Ledger.live_in(db, record.id, Kind.VOLUME, path)

        await self._core.database.write(work, durable=True)
        self._all[record.id] = record
        trace("volume.after_row")

    async def _forget(self, record: VolumeRecord) -> None:
        """Its file, its place in the ledger and in the budget."""
        await asyncio.to_thread(self.path(record.id).unlink, missing_ok=True)
        await self._core.ledger.released(record.id, Kind.VOLUME)
        self._core.admission.release(record.id)

    @asynccontextmanager
    async def _held(self, record: VolumeRecord, label: str, refused: str, *, read_only: bool = False) -> AsyncIterator[None]:
        """Claimed for a job."""
        await self.left({record.id})
        job = new_id("job")
        wanted = [Mounted(id=record.id, name=record.name, path="", read_only=read_only)]
        await self._core.database.write(lambda db: claim_in(db, job, label, wanted, refused=refused))
        try:
            yield
        finally:
            await asyncio.shield(self._core.database.write(lambda db: unclaim_in(db, job)))

    async def _value(self, record: VolumeRecord) -> Volume:
        users: list[VolumeUser] = await self._core.database.read(lambda db: users_in(db, record.id))
        used = await asyncio.to_thread(files.used_bytes, self.path(record.id))
        return Volume(
            id=record.id,
            name=record.name,
            size=record.size,
            created_at=record.created_at,
            owner=record.owner,
            used=used,
            users=users,
        )
