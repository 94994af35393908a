"""Images and kernels: what the store holds."""

from __future__ import annotations

from typing import Any

from stoker.api.models import Image, ImageList, Kernel, KernelList
from stoker.server.endpoint import Call, Routes

__all__ = ["routes"]

routes: Routes[Any] = Routes("images")


@routes.get("/v1/images", answers={200: ImageList})
async def list_images(call: Call) -> ImageList:
    """List the images in the store, the newest first."""
    return await call.engine.images.images(call.principal)


@routes.get("/v1/images/{image}", answers={200: Image}, errors=(404,))
async def get_image(call: Call) -> Image:
    """One image."""
    return await call.engine.images.image(call.principal, call.path["image"])


@routes.delete("/v1/images/{image}", answers={204: None}, errors=(403, 404, 409), local=True)
async def remove_image(call: Call) -> None:
    """Remove an image, unless a sandbox uses it.

    By name: that name, and the content with its last name. By digest: all of it. `image_in_use` (409) names its users.
    """
    await call.engine.images.remove("images", call.path["image"])


@routes.get("/v1/kernels", answers={200: KernelList})
async def list_kernels(call: Call) -> KernelList:
    """List the kernels in the store, the newest first."""
    return await call.engine.images.kernels(call.principal)


@routes.get("/v1/kernels/{kernel}", answers={200: Kernel}, errors=(404,))
async def get_kernel(call: Call) -> Kernel:
    """One kernel."""
    return await call.engine.images.kernel(call.principal, call.path["kernel"])


@routes.delete("/v1/kernels/{kernel}", answers={204: None}, errors=(403, 404, 409), local=True)
async def remove_kernel(call: Call) -> None:
    """Remove a kernel, unless a sandbox uses it.

    As an image is; the code is `kernel_in_use`.
    """
    await call.engine.images.remove("kernels", call.path["kernel"])
