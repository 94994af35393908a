"""API keys: 256 random bits, shown once, kept as their SHA-256; revocable, with a quota and the time of the last use."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sqlite3
import time
from typing import Final

import msgspec
from msgspec.structs import replace

from stoker.api.models import ApiKey, ApiKeyPage, CreatedKey, CreateKey, Quota
from stoker.engine.database import Database
from stoker.engine.pages import page_after
from stoker.engine.state import new_id
from stoker.errors import NotFound

__all__ = ["Keys"]

USED_EVERY: Final = 60.0
"""Seconds between two notes on disk that a key was used."""


class Keys:
    """All keys in memory; the database has them too."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys: dict[str, ApiKey] = {}
        self._digests: dict[bytes, str] = {}
        self._noted: dict[str, float] = {}
        self._writing: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        rows: list[tuple[str, str]] = await self._database.read(
            lambda db: db.execute("SELECT digest, record FROM keys ORDER BY created").fetchall()
        )
        for digest, text in rows:
            key = msgspec.json.decode(text.encode(), type=ApiKey)
            self._keys[key.id] = key
            self._digests[bytes.fromhex(digest)] = key.id

    async def create(self, request: CreateKey) -> CreatedKey:
        secret = "stoker_" + secrets.token_urlsafe(32)
        key = ApiKey(id=new_id("key", 12), name=request.name, created_at=time.time(), quota=request.quota)
        digest = hashlib.sha256(secret.encode()).digest()
        text = msgspec.json.encode(key).decode()

        def work(db: sqlite3.Connection) -> None:
            values = (key.id, digest.hex(), key.created_at, text)
            db.execute("INSERT INTO keys (id, digest, created, record) VALUES (?, ?, ?, ?)", values)

        await self._database.write(work, durable=True)
        self._keys[key.id] = key
        self._digests[digest] = key.id
        return CreatedKey(key=key, secret=secret)

    def page(self, limit: int, cursor: str | None) -> ApiKeyPage:
        """Newest first, the revoked ones too."""
        keys = sorted(self._keys.values(), key=lambda key: (key.created_at, key.id), reverse=True)
        items, following = page_after(keys, limit, cursor, lambda key: (key.created_at, key.id))
        return ApiKeyPage(items=items, next=following)

    async def revoke(self, key: str) -> ApiKey:
        """At once. What the key made goes on, and is the administrator's."""
        found = self._keys.get(key)
        if found is None:
            raise NotFound("key_unknown", f"there is no key {key}", "stoker key ls")
        if found.revoked_at is None:
            found = self._keys[key] = replace(found, revoked_at=time.time())
            await self._save(found, durable=True)
        return found

    def find(self, digest: bytes) -> ApiKey | None:
        """The key whose secret has this SHA-256, unless it is revoked."""
        name = self._digests.get(digest)
        key = self._keys.get(name) if name is not None else None
        # What is looked up is a hash of the secret: the time this takes tells nothing about a secret that exists.
        if key is None or key.revoked_at is not None:
            return None
        now = time.time()
        key = self._keys[key.id] = replace(key, last_used_at=now)
        if now - self._noted.get(key.id, 0.0) > USED_EVERY:
            self._noted[key.id] = now
            task = asyncio.get_running_loop().create_task(self._save(key))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)
        return key

    def quota(self, owner: str) -> Quota | None:
        """What the owner's sandboxes may hold together; None for whoever is not a key."""
        key = self._keys.get(owner)
        return key.quota if key is not None else None

    async def close(self) -> None:
        if self._writing:
            await asyncio.wait(set(self._writing))

    async def _save(self, key: ApiKey, *, durable: bool = False) -> None:
        text = msgspec.json.encode(key).decode()

        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE keys SET record = ? WHERE id = ?", (text, key.id))

        await self._database.write(work, durable=durable)
