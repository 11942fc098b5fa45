"""Ratings are merged into sidecars as other programs write them; every other byte stays."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from meiqa.errors import OutputUnwritable
from meiqa.sidecars import embedded_packet, merged, rated_by_hand

XMP = "http://ns.adobe.com/xap/1.0/"
LIGHTROOM = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0-c000 1.000000">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
   xmp:CreatorTool="a &lt;b&gt; 'c' > d"
   xmp:Rating="0"
   crs:Exposure2012="+0.35">
   <crs:ToneCurve><rdf:Seq><rdf:li>0, 0</rdf:li><rdf:li>255, 255</rdf:li></rdf:Seq></crs:ToneCurve>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:darktable="http://darktable.sf.net/"
   darktable:history_end="3">
   <darktable:history><rdf:Seq><rdf:li darktable:operation="größe"/></rdf:Seq></darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
""".encode()
EXIFTOOL = b"""\xef\xbb\xbf<?xpacket begin='\xef\xbb\xbf' id='W5M0MpCehiHzreSzNTczkc9d'?>\r
<x:xmpmeta xmlns:x='adobe:ns:meta/' x:xmptk='Image::ExifTool 12.57'>\r
<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>\r
 <rdf:Description rdf:about='' xmlns:dc='http://purl.org/dc/elements/1.1/'>\r
  <dc:title><rdf:Alt><rdf:li xml:lang='x-default'>xmp:Rating="5"</rdf:li></rdf:Alt></dc:title>\r
 </rdf:Description>\r
 <rdf:Description rdf:about='' xmlns:xap='http://ns.adobe.com/xap/1.0/'>\r
  <xap:Label/>\r
  <xap:Rating>0</xap:Rating>\r
 </rdf:Description>\r
</rdf:RDF>\r
</x:xmpmeta>\r
<?xpacket end='w'?>"""
PACKETS = {"lightroom": LIGHTROOM, "darktable": DARKTABLE, "exiftool": EXIFTOOL, "none": None}


def merge(packet: bytes | None, rating: int, label: str = "", *, force: bool = False) -> bytes:
    return merged(packet, "a.xmp", rating, label, force=force)


def found(packet: bytes, name: str) -> list[str]:
    """All values of a property, as attributes and as elements."""
    values = []
    root = ElementTree.fromstring(packet.lstrip(b"\xef\xbb\xbf"))
    for each in root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"):
        values += [v for k, v in each.attrib.items() if k == f"{{{XMP}}}{name}"]
        values += [child.text or "" for child in each.findall(f"{{{XMP}}}{name}")]
    return values


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)
@pytest.mark.parametrize(("rating", "label"), [(4, ""), (5, "Green"), (-1, "Red")])
def test_a_rating_and_a_label_are_merged(packet: bytes | None, rating: int, label: str) -> None:
    once = merge(packet, rating, label)
    assert found(once, "Rating") == [str(rating)]
    assert found(once, "Label") in ([[label]] if label else [[], [""]])
    assert merge(once, rating, label) == once
    again = merge(once, 2, "")
    assert found(again, "Rating") == ["2"]
    assert found(again, "Label") == found(once, "Label")
    assert merge(again, rating, label).count(b"Description") <= once.count(b"Description") + 1


@pytest.mark.parametrize("packet", [LIGHTROOM, DARKTABLE, EXIFTOOL])
def test_every_other_byte_stays(packet: bytes) -> None:
    rated = merge(packet, 4, "Green")
    own = rb" <rdf:Description xmlns:rdf[^>]*/>\n "
    plain = re.sub(own, b"", rated).replace(b">4</xap:", b">0</xap:")
    plain = plain.replace(b'xmp:Rating="4"', b'xmp:Rating="0"')
    assert plain.replace(b"<xap:Label>Green</xap:Label>", b"<xap:Label/>") == packet


def test_what_a_hand_gave_is_known_from_what_was_written_here() -> None:
    ours = merge(LIGHTROOM, 4, "Green")
    assert not rated_by_hand(ours, "a.xmp")
    assert not rated_by_hand(LIGHTROOM, "a.xmp")
    by_hand = ours.replace(b'xmp:Rating="4"', b'xmp:Rating="3"')
    assert rated_by_hand(by_hand, "a.xmp")
    assert rated_by_hand(LIGHTROOM.replace(b'Rating="0"', b'Rating="-1"'), "a.xmp")


def test_a_label_that_a_hand_gave_stays_unless_forced() -> None:
    labelled = LIGHTROOM.replace(b'xmp:Rating="0"', b'xmp:Rating="0" xmp:Label="Blau"')
    assert found(merge(labelled, 5, "Green"), "Label") == ["Blau"]
    assert found(merge(labelled, 5, "Green"), "Rating") == ["5"]
    assert found(merge(labelled, 5, "Green", force=True), "Label") == ["Green"]


@pytest.mark.parametrize(
    "packet",
    [
        b"\0",
        b"no xml",
        LIGHTROOM[:300],
        b"<a/>",
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>',
        b'<!DOCTYPE a [<!ENTITY b "c">]>' + LIGHTROOM,
        LIGHTROOM.decode().encode("utf-16"),
        DARKTABLE.decode().encode("latin-1"),
    ],
)
def test_what_is_no_xmp_is_refused_in_a_line(packet: bytes) -> None:
    for ask in (lambda: merge(packet, 4), lambda: rated_by_hand(packet, "a.xmp")):
        with pytest.raises(OutputUnwritable, match=r"^a.xmp is left as it is: no well-formed XMP"):
            ask()


def test_a_packet_is_found_in_a_photo(tmp_path: Path) -> None:
    photo = tmp_path / "a.jpg"
    photo.write_bytes(b"\xff\xd8\xff\xe1" + DARKTABLE + b"\0" * 9)
    assert embedded_packet(photo) == DARKTABLE[DARKTABLE.index(b"<x:") :].rstrip()
    photo.write_bytes(b"\xff\xd8")
    assert embedded_packet(photo) is None
