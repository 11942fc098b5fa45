"""Nothing acknowledged is lost while devices are killed and the hub comes and goes."""

from __future__ import annotations

from benchmarks.hub_chaos import chaos


def test_devices_agree_in_the_end() -> None:
    found = chaos(devices=3, seconds=6.0, kills=6)
    assert found["right"], found
    assert found["failed"] == []
    assert min(found["learned"], found["synced"], sum(found["outages"].values())) > 0
