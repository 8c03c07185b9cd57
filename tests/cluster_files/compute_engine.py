"""The few calls of Google's interfaces that Ray's launcher makes, answered in this process; what machines were asked for is kept."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httplib2

DONE = {"name": "operation", "status": "DONE"}


class ComputeEngine:
    """Stands in the place of ``httplib2.Http.request``."""

    def __init__(self, project: str) -> None:
        self.project = project
        self.instances: dict[str, dict[str, Any]] = {}
        self.asked: list[dict[str, Any]] = []
        """Bodies of ``instances.insert``, as they were sent."""

    def request(self, uri: str, method: str = "GET", body: Any = None, *_args: Any, **_more: Any) -> tuple[httplib2.Response, bytes]:
        url = urlsplit(uri)
        data = json.loads(body) if body else {}
        answer = self._answer(method, url.path.removeprefix("/compute/v1"), data, parse_qs(url.query))
        return httplib2.Response({"status": 200, "content-type": "application/json"}), json.dumps(answer).encode()

    def _answer(self, method: str, path: str, data: dict[str, Any], query: dict[str, list[str]]) -> dict[str, Any]:
        if path.endswith(":getIamPolicy"):
            return {"bindings": []}
        if "/serviceAccounts/" in path:
            return {"email": f"ray@{self.project}.iam.gserviceaccount.com", "projectId": self.project}
        if re.search(r"/instances(/|$)", path):
            return self._instances(method, path.split("/instances")[1].strip("/"), data, query)
        if re.fullmatch(rf"/(v1/)?projects/{self.project}", path):
            return {
                "projectId": self.project,
                "name": self.project,
                "lifecycleState": "ACTIVE",
                "commonInstanceMetadata": {"fingerprint": "f"},
            }
        assert "operations" in path.lower() or path.endswith((":setIamPolicy", "/setCommonInstanceMetadata")), f"{method} {path}"
        return DONE

    def _instances(self, method: str, rest: str, data: dict[str, Any], query: dict[str, list[str]]) -> dict[str, Any]:
        name, _, verb = rest.partition("/")
        if method == "POST" and not rest:
            self.asked.append(data)
            address = {"networkIP": f"10.0.0.{len(self.asked)}"}
            self.instances[data["name"]] = data | {"status": "RUNNING", "labelFingerprint": "f", "networkInterfaces": [address]}
            return DONE
        if verb == "setLabels":
            self.instances[name]["labels"] = data["labels"]
            return DONE
        if method == "DELETE":
            del self.instances[name]
            return DONE
        if name:
            return self.instances[name]
        wanted = dict(re.findall(r"labels\.([\w-]+) = ([\w-]+)", query["filter"][0]))
        return {"items": [one for one in self.instances.values() if wanted.items() <= one["labels"].items()]}


def unknown_fields(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str = "") -> list[str]:
    """Where ``value`` has a field, a type or a word that Google's own description of its interface does not.

    Args:
        value: What is sent.
        schema: Its description in the discovery document.
        schemas: All descriptions of the document.
        at: Dotted path of ``value``, for the answer.
    """
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds: dict[str, type | tuple[type, ...]] = {"object": dict, "array": list, "string": str, "boolean": bool}
    wrong_type = schema["type"] in kinds and not isinstance(value, kinds[schema["type"]])
    number_as_text = schema.get("format") in ("int64", "uint64") and isinstance(value, int)
    if wrong_type and not number_as_text:
        return [f"{at}: not a {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value}"]
    found: list[str] = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += unknown_fields(item, schema["items"], schemas, f"{at}.{index}")
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            found += unknown_fields(item, inner, schemas, f"{at}.{name}") if inner else [f"{at}.{name}: unknown"]
    return found
