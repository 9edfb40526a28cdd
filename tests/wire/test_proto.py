"""The generated code is that of the proto files."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "proto" / "fedmoe" / "v1"


@pytest.mark.slow
def test_the_committed_code_is_what_the_generator_makes_of_the_proto_files(tmp_path):
    names = sorted(path.name for path in PROTOS.glob("*.proto"))
    assert names
    # As `make proto` has it: proto/fedmoe/v1 is seen as fedmoe/wire, where the code lies.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Ifedmoe/wire={PROTOS}"]
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, *out, *(f"fedmoe/wire/{name}" for name in names)], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "fedmoe" / "wire").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "fedmoe" / "wire").glob("*_pb2.py*")}
    assert made == kept
