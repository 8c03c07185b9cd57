"""Texts in a bucket, of a real S3 interface on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pause_ray.core.node_probe import probe_node
from pause_ray.data.documents import SourceSpec, read_documents

ESSAYS = {"essays/a.txt": "first", "essays/deep/b.txt": "second", "notes.md": "third"}


@pytest.fixture(scope="module")
def options() -> Iterator[str]:
    """What an address in a bucket ends with to be asked for here."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        client = boto3.client("s3", "us-east-1", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="texts")
        for key, text in ESSAYS.items():
            client.put_object(Bucket="texts", Key=key, Body=text.encode())
        yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    moto.stop()


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("essays", ["first", "second"]),
        ("essays/*.txt", ["first"]),
        ("**/*.txt", ["first", "second"]),
        ("notes.md", ["third"]),
    ],
)
def test_documents_of_a_bucket_are_read(path: str, texts: list[str], options: str, tmp_path: Path) -> None:
    source = SourceSpec.parse({"path": f"s3://texts/{path}{options}"}, origin="test")
    assert [document.text for document in read_documents(source, cache=tmp_path)] == texts


def test_a_machine_tells_what_of_a_bucket_it_does_not_see(options: str, tmp_path: Path) -> None:
    paths = {part: f"s3://{part}{options}" for part in ("texts/essays", "texts/essays/*.txt", "texts/gone", "others/essays")}
    found = probe_node(tmp_path, probe="x", paths=list(paths.values())).unseen
    assert found.keys() == {paths["texts/gone"], paths["others/essays"]}
    assert found[paths["texts/gone"]] == f"{paths['texts/gone']} is not there"
