#!/usr/bin/env bash
# NVIDIA DALI 2.4.0's own tool wds2idx writes an index of a WebDataset archive that DALI's own reader
# refuses if a name in the archive holds a space: fields of the index are separated by spaces, and the
# name of a member is one of them. Without the index, the same archive is read. A name whose spaces are
# percent-encoded in the index is accepted: the reader takes members by their offsets.
#
# Seen on 2026-11-30: "Critical error when building pipeline" with the tool's index; labels [0, 1]
# without it, and with the encoded names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20 numpy==2.4.6
venv/bin/python - <<'END'
import io
import subprocess
import tarfile

import numpy as np
from nvidia.dali import fn, pipeline_def

with tarfile.open("a.tar", "w") as tar:
    for row in range(2):
        for suffix, data in (("bin", b"some data"), ("cls", str(row).encode())):
            member = tarfile.TarInfo(f"my photo {row}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
subprocess.run(["venv/bin/wds2idx", "a.tar", "a.idx"], check=True, stdout=subprocess.DEVNULL)
text = open("a.idx").read()
print(text)
with open("encoded.idx", "w") as file:
    file.write(text.replace("my photo ", "my%20photo%20"))


def labels(**options):
    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def graph():
        return tuple(fn.readers.webdataset(paths=["a.tar"], ext=["bin", "cls"], **options))

    pipeline = graph()
    try:
        pipeline.build()
        found = pipeline.run()[1]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return [bytes(np.asarray(found.at(row))) for row in range(2)]


found = [labels(), labels(index_paths=["encoded.idx"]), labels(index_paths=["a.idx"])]
print(*found, sep="\n")
assert found[:2] == [[b"0", b"1"]] * 2, found
assert found[2] == "Critical error when building pipeline:", found
END
