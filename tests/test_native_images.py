"""Linked code in a file: a stored image comes back, and one with anything changed is refused."""

import hashlib
import struct

import pytest

from pocketlm.runtime.native.linker import Image, ImageError, from_bytes, to_bytes

SMALL = Image("x86_64", b"\x48\x8d\x47\x01\xc3", {"increment": 0})  # lea rax, [rdi + 1]; ret


def test_a_stored_image_comes_back():
    assert from_bytes(to_bytes(SMALL)) == SMALL


def test_a_stored_image_with_any_byte_changed_or_missing_is_refused():
    data = to_bytes(SMALL)
    for k in range(len(data)):
        for changed in (data[:k] + bytes([data[k] ^ 0x40]) + data[k + 1 :], data[:k], data[:k] + data[k + 1 :]):
            with pytest.raises(ImageError):
                from_bytes(changed)
    with pytest.raises(ImageError):
        from_bytes(data + b"\0")


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b"{}", b'{"machine":"x86_64","symbols":{"f":5}}', b'{"machine":"x86_64","symbols":{"f":-1}}', b"\xff",
     b'{"machine":"x86_64","symbols":{"f":true}}', b'{"machine":"vax","symbols":{}}', b'{"machine":[],"symbols":{}}',
     b'{"machine":"x86_64","symbols":[0]}', b'{"machine":"x86_64","symbols":{"f":0.0}}'],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_refused_even_with_the_right_checksum(header):
    body = header + b"\xc3" * 5
    with pytest.raises(ImageError, match="makes no sense"):
        from_bytes(struct.pack("<8s32sII", b"plmcode1", hashlib.sha256(body).digest(), len(header), 5) + body)
