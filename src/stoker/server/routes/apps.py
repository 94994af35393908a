"""App archives: uploaded once under their checksum, named by it in a create."""

from __future__ import annotations

from typing import Any

import msgspec

from stoker.api.models import AppInfo
from stoker.api.volumes import Digest
from stoker.errors import InvalidRequest
from stoker.server.bodies import stream_body
from stoker.server.endpoint import Call, Content, Routes
from stoker.server.routes.files import MAX_UPLOAD

__all__ = ["routes"]

routes: Routes[Any] = Routes("apps")
ARCHIVE = Content(("application/octet-stream",), "A zip, tar or tar.gz.")


def _digest(call: Call) -> str:
    try:
        return msgspec.convert(call.path["app"], Digest)
    except msgspec.ValidationError:
        raise InvalidRequest("bad_digest", "an app is named by the SHA-256 of its archive, 64 hexadecimal digits") from None


@routes.get("/v1/apps/{app}", answers={200: AppInfo}, errors=(404,))
async def get_app(call: Call) -> AppInfo:
    """Whether an archive with this SHA-256 is here."""
    return await call.engine.apps.get(call.principal, _digest(call))


@routes.put("/v1/apps/{app}", answers={200: AppInfo}, errors=(413,), upload=ARCHIVE)
async def put_app(call: Call) -> AppInfo:
    """Upload an app archive under its SHA-256.

    What is in it is looked at: absolute names, `..`, names below links, entries that are there twice, devices and more than the
    bounds allow are refused (`bad_archive`, with the entry). The body is the archive as it is: `Content-Encoding` is not for it.
    """
    body = stream_body([h for h in call.headers if h[0] != b"content-encoding"], call.request.receive, MAX_UPLOAD)
    return await call.engine.apps.put(call.principal, _digest(call), body)
