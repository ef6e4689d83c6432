"""Find parts of a JSON schema that no finite value fits, such as an object that requires another one of its kind.

Every part is a node of a graph: it needs all of its conditions (each required property, a reference) or one of them
(a type, an alternative of anyOf). Nodes are marked from those that need nothing, so that a cycle is never marked by
itself. Keywords that are not looked at here never exclude a value: a part that is found to have none has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from qat_edge.data.schema_parts import parts_of, resolve

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
ALWAYS = 0  # node that needs nothing

TypesOf = Callable[[dict[str, Any]], Collection[str]]


def _any_type(_: dict[str, Any]) -> Collection[str]:
    return TYPES


class PossibleValues:
    """Parts of a schema that a finite value fits.

    Args:
        schema: whose references lead to parts of it.
        implied_types: returns the types of a part without 'type'; any by default.
    """

    def __init__(self, schema: dict[str, Any], implied_types: TypesOf = _any_type) -> None:
        self._schema = schema
        self._finite = _Conditions(schema, implied_types, follow=True)
        self._without_references = _Conditions(schema, implied_types, follow=False)

    def fits(self, part: Any) -> bool:
        """Return whether a finite value fits a part."""
        return self._finite.is_met(part)

    def endless_references(self) -> Iterator[tuple[str, str]]:
        """Yield place and target of each reference to a part that only a value without an end fits."""
        for place, part in parts_of(self._schema):
            target = resolve(self._schema, part["$ref"]) if isinstance(part, dict) and "$ref" in part else True
            if not self._finite.is_met(target) and self._without_references.is_met(target):
                yield place, part["$ref"]


class _Conditions:
    """Graph of the conditions for a value. follow: a reference needs its target, in place of nothing."""

    def __init__(self, schema: dict[str, Any], implied_types: TypesOf, follow: bool) -> None:
        self._schema, self._implied_types, self._follow = schema, implied_types, follow
        self._lacking = [0]  # conditions that each node still needs
        self._dependents: list[list[int]] = [[]]  # nodes that each node is a condition of
        self._nodes: dict[int, int] = {}  # by the identity of a part

        # All nodes first, because references lead anywhere.
        parts = [part for _, part in parts_of(schema) if isinstance(part, dict)]
        for part in parts:
            self._nodes[id(part)] = self._add(1, ())
        for part in parts:
            self._dependents[self._condition(part)].append(self._nodes[id(part)])
        self._met = self._mark()

    def is_met(self, part: Any) -> bool:
        """Return whether a value fits a part."""
        return part is not False and self._node(part) in self._met

    def _mark(self) -> set[int]:
        """Return the nodes whose conditions are met, from those without any on."""
        pending = [node for node, lacking in enumerate(self._lacking) if not lacking]
        found = set(pending)
        while pending:
            for dependent in self._dependents[pending.pop()]:
                self._lacking[dependent] -= 1
                if self._lacking[dependent] == 0:
                    found.add(dependent)
                    pending.append(dependent)
        return found

    def _add(self, needed: int, conditions: Iterable[int]) -> int:
        """Add a node that needs so many of its conditions, and return it."""
        node = len(self._lacking)
        self._lacking.append(needed)
        self._dependents.append([])
        for condition in conditions:
            self._dependents[condition].append(node)
        return node

    def _all(self, conditions: Collection[int]) -> int:
        return self._add(len(conditions), conditions)

    def _any(self, conditions: Collection[int]) -> int:
        return self._add(1, conditions)

    def _node(self, part: Any) -> int:
        """Return the node of a part; what is no part of its own, such as a list, permits any value."""
        if part is False:
            return self._any(())
        return self._nodes.get(id(part), ALWAYS)

    def _condition(self, part: dict[str, Any]) -> int:
        """Return the node for what a value of a part needs."""
        # Drafts before 2019-09 ignore the keywords next to a reference.
        if "$ref" in part:
            return self._node(resolve(self._schema, part["$ref"])) if self._follow else ALWAYS
        conditions = [self._node(each) for each in part.get("allOf", ())]
        conditions += [self._any([self._node(each) for each in part[key]]) for key in ("anyOf", "oneOf") if key in part]
        if part.get("enum") == []:
            return self._any(())
        if "enum" not in part and "const" not in part:
            types = part.get("type") or self._implied_types(part)
            types = [types] if isinstance(types, str) else types
            conditions.append(self._any([self._of_type(name, part) for name in types]))
        return self._all(conditions)

    def _of_type(self, name: str, part: dict[str, Any]) -> int:
        """Return the node for what a value of one type needs."""
        if name == "object" and "patternProperties" not in part:
            properties, further = part.get("properties", {}), part.get("additionalProperties", True)
            return self._all([self._node(properties.get(key, further)) for key in part.get("required", ())])
        if name == "array" and part.get("minItems", 0) >= 1:
            first = list(islice(part.get("prefixItems", ()), int(part["minItems"])))
            further = part.get("items", True) if len(first) < part["minItems"] else True
            return self._all([self._node(each) for each in (*first, further)])
        return ALWAYS
