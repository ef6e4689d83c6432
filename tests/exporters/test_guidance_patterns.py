"""Regular expressions of JSON schema mean the same in Rust's form, up to the vertical tab."""

from __future__ import annotations

import pytest

from qat_edge_exporters.onnx.guidance_patterns import for_guidance, has_escaped_character


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^a[b-d]\[+\d{2}$", r"^a[b-d]\[+\d{2}$"),
        ("[[:alpha:]]", r"[\[:alpha:]]"),
        (r"[^\\/]x", r"[^\x0b\\/]x"),
        ("[]a]b[^]a]", r"[\]a]b[^\]\x0ba]"),
        ("[a-z&&[^b]]", r"[a-z\&\&\[^b]]"),
        ("[+--]~&", r"[+-\-]~&"),
        ("[a", "[a"),
        ("a\\", "a\\"),
    ],
)
def test_classes_have_no_operators_of_rust(pattern: str, expected: str) -> None:
    assert for_guidance(pattern) == expected


@pytest.mark.parametrize(("pattern", "has"), [(r"\\", True), ('a"', True), (r"[\"a\\]\d\[", False), (r"[a]\"", True)])
def test_escaped_characters_outside_of_classes_are_found(pattern: str, has: bool) -> None:
    assert has_escaped_character(pattern) is has
