"""Computes the bytes of an output per transfer method, for `raymoe plan CONFIG OUT`. Nothing is measured."""

from __future__ import annotations

from raymoe.object_store.location import LocationKind
from raymoe.planning.multipart import CopyRange, server_side_bytes, spans, upload_parts
from raymoe.planning.plan import MergePlan
from raymoe.storage.outputs.protocol import Output

TRANSFER_METHODS = {
    "store_copy": "copied inside the object store",
    "streamed": "read from an object store or the Hub by an actor",
    "local": "read from a local file by an actor",
    "computed": "computed by an actor (headers, routers, transforms)",
}


def bytes_by_method(plan: MergePlan, output: Output) -> dict[str, int]:
    """Bytes of the output's shards per method of `TRANSFER_METHODS`; together they are the output's bytes."""
    ways = dict.fromkeys(TRANSFER_METHODS, 0)
    store_copies = output.location.kind is LocationKind.S3
    for shard in plan.shards:
        copied = server_side_bytes(upload_parts(shard, output.same_store)) if store_copies else 0
        ways["store_copy"] += copied
        ways["computed"] += len(shard.header)
        for span in spans(shard.parts):
            method = "computed"
            if isinstance(span.what, CopyRange):
                method = "local" if span.what.file.kind.is_local else "streamed"
            ways[method] += span.end - span.start
        # Copied bytes were counted under their source above.
        ways["streamed"] -= copied
    return {method: count for method, count in ways.items() if count}
