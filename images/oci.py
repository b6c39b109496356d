"""Writes OCI image archives: no daemon, no registry, nothing but Python.

A layer is a tar of what is added to it in order; an archive holds the layers, a configuration and the manifest that
names both by digest (github.com/opencontainers/image-spec). Times and owners are fixed, so equal input gives equal bytes.
"""

import gzip
import hashlib
import io
import json
import os
import platform
import struct
import subprocess
import tarfile

NET_ADMIN, NET_RAW = 12, 13  # linux/capability.h
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
EPOCH = "1970-01-01T00:00:00Z"


def file_capability(*capabilities, effective):
    """What `setcap cap_..+ep` writes, without `effective` +p: struct vfs_cap_data, revision 2."""
    bits = sum(1 << capability for capability in capabilities)
    return struct.pack("<IIIII", 0x02000000 | effective, bits & 0xFFFFFFFF, 0, bits >> 32, 0)


class Layer:
    def __init__(self):
        self._bytes = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._bytes, mode="w", format=tarfile.PAX_FORMAT)
        self._paths = set()

    def _entry(self, path, mode, kind):
        parent = os.path.dirname(path)
        if parent and parent not in self._paths:
            self.directory(parent)
        self._paths.add(path)
        entry = tarfile.TarInfo(path)
        entry.mode, entry.type, entry.mtime = mode, kind, 0
        return entry

    def directory(self, path, mode=0o755):
        self._tar.addfile(self._entry(path, mode, tarfile.DIRTYPE))

    def link(self, path, target):
        entry = self._entry(path, 0o777, tarfile.SYMTYPE)
        entry.linkname = target
        self._tar.addfile(entry)

    def file(self, path, data, mode=0o644, capability=None):
        if path in self._paths:
            return
        entry = self._entry(path, mode, tarfile.REGTYPE)
        entry.size = len(data)
        if capability:
            # PAX headers are text to Python; surrogates carry the bytes that are none.
            text = capability.decode("utf-8", "surrogateescape")
            entry.pax_headers = {"SCHILY.xattr.security.capability": text}
        self._tar.addfile(entry, io.BytesIO(data))

    def program(self, path, source, capability=None):
        """A program and, where it is dynamic, the libraries that `ldd` names, where it looks for them."""
        with open(source, "rb") as file:
            self.file(path, file.read(), 0o755, capability)
        listing = subprocess.run(["ldd", source], capture_output=True, text=True, check=False).stdout
        for library in (word for word in listing.split() if word.startswith("/")):
            with open(library, "rb") as file:
                self.file(library.lstrip("/"), file.read(), 0o755)

    def tree(self, root):
        """Everything under a directory of this machine."""
        for directory, names, files in os.walk(root):
            for name in sorted(names + files):
                source = os.path.join(directory, name)
                path = os.path.relpath(source, root)
                if os.path.islink(source):
                    self.link(path, os.readlink(source))
                elif os.path.isdir(source):
                    if path not in self._paths:
                        self.directory(path)
                elif os.path.isfile(source):
                    with open(source, "rb") as file:
                        self.file(path, file.read(), os.stat(source).st_mode & 0o7777)

    def close(self):
        self._tar.close()
        return self._bytes.getvalue()


def write(archive, name, layers, entrypoint=(), command=(), user="", compress=False):
    """Writes `archive`, whole or not at all; `name` is what a node knows the image by."""
    blobs = {}

    def blob(data, media_type):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}

    descriptors, diff_ids = [], []
    for layer in layers:
        data = layer.close()
        diff_ids.append("sha256:" + hashlib.sha256(data).hexdigest())
        if compress:
            descriptors.append(blob(gzip.compress(data, 6, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip"))
        else:
            descriptors.append(blob(data, "application/vnd.oci.image.layer.v1.tar"))
    runs_on = {"architecture": ARCHITECTURES[platform.machine()], "os": "linux"}
    settings = {"Entrypoint": list(entrypoint), "Cmd": list(command), "User": user, "WorkingDir": "/"}
    settings["Env"] = ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    configuration = {
        **runs_on,
        "created": EPOCH,
        "config": {key: value for key, value in settings.items() if value},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": EPOCH} for _ in diff_ids],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(configuration).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": descriptors,
    }
    reference = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    reference["platform"] = runs_on
    reference["annotations"] = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1],
    }
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [reference],
    }

    unfinished = f"{archive}.{os.getpid()}"
    with tarfile.open(unfinished, "w") as tar:

        def add(path, data):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))

        add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        add("index.json", json.dumps(index).encode())
        for digest, data in blobs.items():
            add("blobs/sha256/" + digest, data)
    os.replace(unfinished, archive)
