"""Gates as JUnit XML, for `validate --junit`: CI systems show which gate failed on which device."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

from qat_edge.evaluate.gates import GatedReport, describe_miss

# Not permitted in XML 1.0 (https://www.w3.org/TR/xml/#charsets), or control characters that no viewer shows.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def junit_xml(reports: Sequence[GatedReport], failures: Mapping[str, str]) -> str:
    """Return gates as JUnit XML: one suite a device, one case a gate and artifact.

    A missed gate is a failure. A figure that was not measured, and a device that failed, is an error.

    Args:
        reports: one a device that was measured.
        failures: reason by device that could not be measured.
    """
    root = ET.Element("testsuites", {"name": "qat-edge validate"})
    for report in reports:
        suite = ET.SubElement(root, "testsuite", {"name": _legal(report.device), "timestamp": report.created})
        for gate in report.gates:
            case = ET.SubElement(suite, "testcase", {"classname": gate.measured, "name": gate.flag})
            if not gate.passed:
                _add_problem(case, "error" if math.isnan(gate.found) else "failure", describe_miss(gate))

    for device, reason in failures.items():
        suite = ET.SubElement(root, "testsuite", {"name": _legal(device)})
        case = ET.SubElement(suite, "testcase", {"classname": _legal(device), "name": "measured"})
        _add_problem(case, "error", reason)

    # Readers expect the counts on every suite and on the root.
    for element in (*root, root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            element.set(attribute, str(len(list(element.iter(tag)))))

    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _add_problem(case: ET.Element, tag: str, message: str) -> None:
    ET.SubElement(case, tag, {"message": _legal(message)})


def _legal(text: str) -> str:
    """Replace characters that XML does not permit, and control characters."""
    return _CONTROL.sub("\ufffd", text)
