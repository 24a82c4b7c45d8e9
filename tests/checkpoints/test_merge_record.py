"""What of a merge's record is published."""

from __future__ import annotations

import json

import xxhash

from raymoe.checkpoints.merge_record import MergeRecord


def test_a_published_record_says_nothing_of_the_user_s_object_store() -> None:
    """Its address and the profile are this user's own; the rest is what others need too."""
    storage = {"endpoint": "http://10.0.0.7:9000", "profile": "work", "region": "eu-west-1"}
    files = {"README.md": {"size": 1, "checksum": "xxh3-128:0"}, "config.json": {"size": 2, "checksum": "xxh3-128:1"}}
    content = {"plan_digest": "d", "files": files, "config": {"gate_mode": "random", "storage": storage}}
    record = MergeRecord(where="raymoe.json", content=content, files={}, sources=(), prompt_files=())
    published = json.loads(record.to_publish("org/name", "# Card\n"))
    assert published["config"] == {"gate_mode": "random", "storage": {"region": "eu-west-1"}}
    assert published["published_as"] == "org/name" and published["plan_digest"] == "d"
    card = {"size": 7, "checksum": f"xxh3-128:{xxhash.xxh3_128(b'# Card' + bytes([10])).hexdigest()}"}
    assert published["files"] == files | {"README.md": card}
    assert "profile" in storage and files["README.md"]["size"] == 1, "the merge's own record is as it was"
