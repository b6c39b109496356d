"""Asks for a certificate as any gRPC program would: client.py PROTO_DIR DIR ADDR.

DIR holds csr.pem and its key.pem, next.pem, token and roots.pem. Prints what it saw as JSON."""

import json
import pathlib
import sys
import tempfile

import grpc
import grpc_tools
from grpc_tools import protoc

protos, place, addr = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
made = tempfile.mkdtemp(dir=place)
well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
assert 0 == protoc.main(
    ["protoc", f"-I{protos}", f"-I{well_known}", f"--python_out={made}", f"--grpc_python_out={made}", "istio_ca.proto"]
)
sys.path.insert(0, made)
import istio_ca_pb2 as messages  # noqa: E402
import istio_ca_pb2_grpc as services  # noqa: E402

options = [("grpc.ssl_target_name_override", "malha.malha-system.svc")]


def connect(key=None, chain=None):
    credentials = grpc.ssl_channel_credentials((place / "roots.pem").read_bytes(), key, chain)
    return grpc.secure_channel(addr, credentials, options)


channel = connect()
service = services.IstioCertificateServiceStub(channel)
csr = (place / "csr.pem").read_text()
token = [("authorization", f"Bearer {(place / 'token').read_text()}"), ("clusterid", "Kubernetes")]


def ask(csr, metadata, service=service):
    request = messages.IstioCertificateRequest(csr=csr, validity_duration=3600)
    request.metadata.update({"CertSigner": ""})
    return list(service.CreateCertificate(request, metadata=metadata, timeout=20).cert_chain)


def refused(csr, metadata):
    try:
        ask(csr, metadata)
    except grpc.RpcError as error:
        told = dict(error.trailing_metadata())
        return [error.code().name, told.get("malha-code")]
    return "granted"


def unknown():
    method = channel.unary_unary("/istio.v1.auth.IstioCertificateService/Unknown")
    try:
        method(b"", timeout=20)
    except grpc.RpcError as error:
        return error.code().name
    return "answered"


chain = ask(csr, token)
renewing = connect((place / "key.pem").read_bytes(), "".join(chain[:-1]).encode())
json.dump(
    {
        "chain": chain,
        "again": "the same" if ask(csr, token) == chain else "another",
        "without_token": refused(csr, []),
        "bad_csr": refused("hello", token),
        "unknown_method": unknown(),
        "other_cluster": refused(csr, [token[0], ("clusterid", "remote")]),
        "renewed": ask((place / "next.pem").read_text(), [], services.IstioCertificateServiceStub(renewing)),
    },
    sys.stdout,
)
