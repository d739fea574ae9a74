"""What each fused operation launches, forward and backward, as plain functions on [N, H, W, C] images.

A call is its tensors and its `Settings`. `ops` makes one operator per direction of each `Part`, `autograd` calls them.
"""

from __future__ import annotations

from fastmbconv.call import Part
from fastmbconv.fused import dense, mbconv, single

PARTS: dict[str, Part] = {
    part.name: part for part in (mbconv.PART, dense.PART, single.DEPTHWISE, single.EXCITE, single.NORM, single.POOL)
}
