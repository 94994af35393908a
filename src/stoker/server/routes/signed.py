"""Signed URLs: made by who may use the sandbox, used by whoever has them."""

from __future__ import annotations

import time
from typing import Any

from stoker.api.models import FileInfo, Principal, SignedOperation, SignedUrl, SignUrl
from stoker.errors import Forbidden
from stoker.server.endpoint import GUEST, Call, Routes
from stoker.server.replies import ByteStream, Reply
from stoker.server.routes.files import BASE, BINARY, DOWNLOAD_ANSWERS, FILE_ERRORS, FileQuery, WriteQuery, download, upload
from stoker.server.signing import Claim

__all__ = ["routes"]

routes: Routes[Any] = Routes("files")


@routes.post(BASE + "/sign", answers={200: SignedUrl}, errors=(404,))
async def sign_url(call: Call, body: SignUrl) -> SignedUrl:
    """Make a URL that reads or writes one file without a key, until it expires or the key it was made with is revoked."""
    sandbox = await call.engine.get(call.principal, call.sandbox)
    expires = int(time.time()) + body.expires_in
    claim = Claim(
        sandbox=sandbox.id,
        path=body.path,
        operation=body.operation,
        expires=expires,
        owner=call.principal.owner,
        user=body.user,
    )
    method = "GET" if body.operation is SignedOperation.READ else "PUT"
    return SignedUrl(url=f"/v1/signed/{call.services.signer.sign(claim)}", method=method, expires_at=float(expires))


async def _claimed(call: Call, operation: SignedOperation) -> tuple[Claim, Principal]:
    claim = call.services.signer.check(call.path["token"])
    if claim.operation is not operation:
        raise Forbidden("wrong_operation", f"the URL is for a {claim.operation.value}", "ask for another one")
    if claim.owner == "local":
        return claim, Principal()
    cursor: str | None = None
    while True:
        page = await call.engine.keys(limit=1000, cursor=cursor)
        for key in page.items:
            if key.id == claim.owner and key.revoked_at is None:
                return claim, Principal(owner=claim.owner, admin=False)
        cursor = page.next
        if cursor is None:
            raise Forbidden("url_revoked", "the key that made the URL has been revoked", "ask for a new one")


@routes.get("/v1/signed/{token}", answers=DOWNLOAD_ANSWERS, errors=(*GUEST, 416), public=True)
async def read_signed(call: Call) -> Reply | ByteStream:
    """Download the file of a signed URL, as with a key."""
    claim, who = await _claimed(call, SignedOperation.READ)
    return await download(call, who, claim.sandbox, FileQuery(path=claim.path, user=claim.user))


@routes.put("/v1/signed/{token}", answers={200: FileInfo}, errors=FILE_ERRORS, upload=BINARY, public=True)
async def write_signed(call: Call) -> FileInfo:
    """Upload the file of a signed URL."""
    claim, who = await _claimed(call, SignedOperation.WRITE)
    return await upload(call, who, claim.sandbox, WriteQuery(path=claim.path, user=claim.user))
